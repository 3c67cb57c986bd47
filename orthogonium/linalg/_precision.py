"""Working precision: half types are computed in float32, and ranges are tamed by powers of two."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._full_products import ON

Rest = ParamSpec("Rest")
_NOTHING = nullcontext()


class NonFiniteError(ValueError):
    """A matrix holds NaN or Inf, so that nothing about it can be promised."""


def raise_if_not_finite(name: str, matrix: Tensor) -> None:
    """Raise :class:`NonFiniteError` with the count of bad entries; waits for the device."""
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NonFiniteError(
            f"{name} of shape {tuple(matrix.shape)} holds NaN or Inf in {bad} of {matrix.numel()} entries. "
            "Lower the learning rate, clip gradients, or reload the last good checkpoint."
        )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without its price where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_vectorized(tensor: Tensor) -> bool:
    """Whether this is one gradient of many, as ``torch.autograd.grad(is_grads_batched=True)`` passes them.

    Such a tensor looks like a single one, and must not be written into one that is.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which no product on the tensor's device is rounded to half precision behind our back.

    Neither by autocast nor, outside of compiled code, by ``torch.set_float32_matmul_precision``.
    """
    reduced = ON["cuda" if tensor.is_cuda else "cpu"]
    outside = torch.compiler.is_compiling() or not reduced.are_needed()
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING if outside else reduced
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _NOTHING if outside else reduced
    if outside:
        return torch.autocast(device, enabled=False)
    both = ExitStack()
    both.enter_context(reduced)
    both.enter_context(torch.autocast(device, enabled=False))
    return both


def in_working_precision(
    function: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Compute ``function(matrix, ...)`` in float32 at least and round once; outside autocast.

    Checks that ``matrix`` is a real floating-point ``(..., m, n)`` tensor.
    """

    @wraps(function)
    def call(matrix: Tensor, *args: object, **kwargs: object) -> Tensor:
        check_matrix("matrix", matrix)
        check_floating("matrix", matrix)
        with without_autocast(matrix):
            if matrix.dtype in (torch.float32, torch.float64):
                return function(matrix, *args, **kwargs)
            return function(matrix.float(), *args, **kwargs).to(matrix.dtype)

    return call


def scaled_to_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``(X, e)`` with ``matrix = X · 2^e`` exactly and the largest ``|X|`` of each matrix in [1/2, 1).

    Powers of two do not round, and ``1e±30`` or subnormal entries become ordinary ones.

    Args:
        matrix: ``(..., m, n)``, finite.

    Returns:
        ``X`` of the same shape and ``e`` of shape ``(..., 1, 1)``, int32; zero matrices get ``e = 0``.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True) if matrix.numel() else matrix.sum((-2, -1), keepdim=True)
    exponent = torch.frexp(largest.double()).exponent
    return times_power_of_two(matrix, -exponent), exponent


def times_power_of_two(matrix: Tensor, exponent: Tensor) -> Tensor:
    """``matrix · 2^exponent`` in two factors, since ``2^e`` alone may leave the range of the type."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    one = torch.ones_like(exponent, dtype=matrix.dtype)
    return matrix * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def smallest_safe_scale(dtype: torch.dtype) -> float:
    """The least scale that a gradient is divided by, so that its inverse stays far from overflow."""
    return math.ldexp(torch.finfo(dtype).tiny, 20)


def differentiates_forward() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode differentiation is at work.

    There a remembered weight would carry no tangent, and a map is best written in its own differentiable parts.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
