"""Exponential and Cayley maps of a skew matrix, applied to a frame at the cost of the frame.

A tall frame ``Q₀`` (orthonormal columns) and a free matrix ``X`` of its shape ``(N, k)`` give the skew matrix
``A = X Q₀ᵀ − Q₀ Xᵀ`` of rank ``2k``; the result is ``f(A) Q₀`` with ``f`` the exponential or ``(1 + x/2)/(1 − x/2)``.
With ``C = Q₀ᵀ X``, ``X₂ = X − Q₀ C``, ``S = C − Cᵀ``, ``Z = X₂ᵀ X₂`` and any ``α > 0``, ``A`` is in the coordinates of
``[Q₀, X₂/α]`` the small matrix

    M = [[S, −Z/α], [α I, 0]]          so          f(A) Q₀ = Q₀ f(M)₁₁ + (X₂/α) f(M)₂₁,

which costs ``O(N k²)`` and is smooth also where ``X₂`` has dependent columns. A square frame takes ``X`` in its own
coordinates, ``C = X``, and is ``Q₀ f(X − Xᵀ)``. Every frame is reached, square ones within
their determinant. Source: Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20(2), 1998, section 2.4, which
uses a QR factorisation of ``X₂`` instead of ``Z``.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._exponential_steps import expm, expm_reverse, squarings_for
from orthogonium.linalg._factorizations import definite_inverse
from orthogonium.linalg._figures import frobenius, largest, trace
from orthogonium.linalg._functions import apply
from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._precision import (
    differentiates_forward,
    in_dtype,
    raise_if_not_finite,
    without_autocast,
)
from orthogonium.linalg._products import add_product, product, roomy_product, skew_part, symmetric_product
from orthogonium.linalg._pullback import Pullback, transposed, with_pullback_in_working_precision
from orthogonium.linalg._skew_spectral import spectral_gradient, spectral_map

Map = Literal["exponential", "cayley"]

# Above this norm of A a Cayley solve in working precision loses too many digits, and below this one none that matter.
_CAYLEY_NORM, _CALM = 64.0, 32.0

# Up to this norm of A the products of its exponential leave a defect of 3 eps, less than that of a frame to begin with.
_SHORT = 2.0


class _Argument(NamedTuple):
    """``A`` in the coordinates of the header; a square frame has no ``X₂`` and ``Z``, but ``S²`` where it is used."""

    skew: Tensor
    outside: Tensor
    gram: Tensor
    square: Tensor | None = None

    @property
    def thin(self) -> bool:
        return self.gram.ndim > 0


def _coordinates(free: Tensor, base: Tensor) -> _Argument:
    if base.shape[-2] == base.shape[-1]:
        nothing = free.new_zeros(())
        return _Argument(free - free.mT, nothing, nothing)
    cross = base.mT @ free
    skew = cross - cross.mT
    outside = free - base @ cross
    return _Argument(skew, outside, outside.mT @ outside)


def _small_matrix(skew: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """``(M, α)``, with ``α`` of the size of ``X₂`` so that ``M`` is balanced."""
    size = trace(gram).sqrt()[..., None, None]
    alpha = torch.where(size > 0, size, 1.0).detach()
    below = alpha * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    upper = torch.cat([skew, -gram / alpha], dim=-1)
    return torch.cat([upper, torch.cat([below, torch.zeros_like(gram)], dim=-1)], dim=-2), alpha


def _norm_bound(argument: _Argument) -> float:
    """An upper bound on ``‖A‖₂``: the singular values of a skew matrix come in pairs, so ``‖A‖_F / √2``."""
    squared = frobenius(argument.skew).square()
    if argument.thin:
        squared = squared + 2 * trace(argument.gram)
    return (largest(squared) / 2) ** 0.5


def _norm_bound_by_square(square: Tensor) -> float:
    """The same from ``S²``, whose norms are much closer to ``‖S‖₂²`` for a large matrix."""
    pairs = largest(frobenius(square)) / 2**0.5
    rows = largest(torch.linalg.matrix_norm(square, float("inf")))
    return (1 + 1e-3) * min(pairs, rows) ** 0.5


def _polished(q: Tensor) -> Tensor:
    """One Newton–Schulz step on a tall frame."""
    return add_product(q, q, symmetric_product(q.mT, q), scale=-0.5, addend_scale=1.5)


def _fake_forward(free: Tensor, base: Tensor, kind: str, budget: int) -> tuple[Tensor, Tensor]:
    k = base.shape[-1] if kind == "cayley" else 0
    return (
        torch.empty_like(free, memory_format=torch.contiguous_format),
        free.new_empty((*free.shape[:-2], k, k)),
    )


@opaque(_fake_forward)
def _frame_forward(free: Tensor, base: Tensor, kind: str, budget: int) -> tuple[Tensor, Tensor]:
    """``(Q, a)``; the Cayley map keeps the inverse that it made for its derivative, zero where there is none."""
    argument, norm = _measured(free, base, kind, budget)
    nothing = torch.zeros_like(_fake_forward(free, base, kind, budget)[1])
    if norm is None:
        return spectral_map(free, base, kind), nothing
    if kind == "cayley":
        half = _cayley_half(argument)
        frames = base.expand(*half.shape[:-2], *base.shape[-2:])
        q = add_product(frames, frames, half, scale=2.0, addend_scale=-1.0)
        if argument.thin:
            return _polished(q + argument.outside @ half), half
        # the inverse leaves an error of some 20 eps, which a small contract does not hold and a large one does
        accurate = base.shape[-1] >= 128 and norm <= _CALM
        return q if accurate else _polished(q), half
    squarings = squarings_for(norm, free.dtype)
    if not argument.thin:
        q = base @ expm(argument.skew, squarings, argument.square)
        return q if norm <= _SHORT else _polished(q), nothing
    small, alpha = _small_matrix(argument.skew, argument.gram)
    columns = expm(small, squarings)[..., : base.shape[-1]]
    top, bottom = columns.split(base.shape[-1], dim=-2)
    return _polished(base @ top + argument.outside @ (bottom / alpha)), nothing


@opaque(lambda grad, free, *rest: torch.empty_like(free, memory_format=torch.contiguous_format))
def _frame_backward(
    grad: Tensor, free: Tensor, base: Tensor, q: Tensor, half: Tensor, kind: str, budget: int
) -> Tensor:
    """The reverse of :func:`_frame_forward`; cheap intermediates are made again instead of stored."""
    with without_autocast(grad):
        square_frame = base.shape[-2] == base.shape[-1]
        if kind == "cayley" and square_frame:
            if half.flatten()[0].item() == 0:
                return spectral_gradient(grad, free, base, kind)
            through = (q + base).mT  # 2 aᵀ Q₀ᵀ
            return skew_part(roomy_product(product(through, grad).mul_(0.5), half.mT))
        (skew, outside, gram, square), norm = _measured(free, base, kind, budget)
        if norm is None:
            return spectral_gradient(grad, free, base, kind)
        rotated = base.mT @ grad
        if square_frame:
            return skew_part(expm_reverse(skew, squarings_for(norm, free.dtype), rotated, square)[0])
        if kind == "cayley":
            inner = half.mT @ (rotated + 0.5 * outside.mT @ grad) @ half.mT
            gram_grad = -0.5 * inner
            bottom = half
        else:
            k = base.shape[-1]
            small, alpha = _small_matrix(skew, gram)
            seed = torch.cat([rotated, outside.mT @ grad / alpha], dim=-2)
            seed = torch.cat([seed, torch.zeros_like(seed)], dim=-1)
            small_grad, result = expm_reverse(small, squarings_for(norm, free.dtype), seed)
            inner, gram_grad = small_grad[..., :k, :k], -small_grad[..., :k, k:] / alpha
            bottom = result[..., k:, :k] / alpha
        outside_grad = grad @ bottom.mT + outside @ (gram_grad + gram_grad.mT)
        return outside_grad + base @ (inner - inner.mT - base.mT @ outside_grad)


def _measured(free: Tensor, base: Tensor, kind: str, budget: int) -> tuple[_Argument, float | None]:
    """``A`` and a bound on its norm, ``None`` where that is too large for products, and the spectrum is needed."""
    argument = _coordinates(free, base)
    norm = _norm_bound(argument)
    if not norm < float("inf"):
        raise_if_not_finite("matrix", free)
        return argument, None
    measurable = norm < torch.finfo(free.dtype).tiny ** -0.25  # S² is far from overflow
    if not argument.thin and measurable and not (kind == "cayley" and norm <= _CALM):
        square = symmetric_product(argument.skew, argument.skew)
        argument = argument._replace(square=square)
        norm = min(norm, _norm_bound_by_square(square))
    too_large = norm > _CAYLEY_NORM if kind == "cayley" else squarings_for(norm, free.dtype) > budget
    return argument, None if too_large else norm


def _cayley_half(argument: _Argument) -> Tensor:
    """``a = (I − S/2 + Z/4)⁻¹``, the upper block of ``(I − M/2)⁻¹``; its lower block is ``a / 2`` in units of ``X₂``.

    The symmetric part of what is inverted is ``I + Z/4``, definite. For a square frame ``Z = 0``.
    """
    system = argument.skew * -0.5
    if argument.thin:
        system.add_(argument.gram, alpha=0.25)
    system.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return torch.linalg.inv_ex(system).inverse if argument.thin else definite_inverse(system)


def _frame_composite(free: Tensor, base: Tensor, kind: str) -> Tensor:
    """The same map from torch's differentiable functions, for second and forward derivatives."""
    skew, outside, gram, _ = _coordinates(free, base)
    identity = torch.eye(base.shape[-1], dtype=base.dtype, device=base.device)
    if kind == "cayley":
        half = torch.linalg.inv_ex(identity - 0.5 * skew + 0.25 * gram).inverse
        q = base @ (2.0 * half - identity)
        return q + outside @ half if gram.ndim else q
    if not gram.ndim:
        return base @ torch.matrix_exp(skew)
    small, alpha = _small_matrix(skew, gram)
    top, bottom = torch.matrix_exp(small)[..., : base.shape[-1]].split(base.shape[-1], dim=-2)
    return base @ top + outside @ (bottom / alpha)


class _Frame(Function):
    @staticmethod
    def forward(free: Tensor, base: Tensor, kind: str, budget: int) -> tuple[Tensor, Tensor]:
        return _frame_forward(free, base, kind, budget)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.rest = inputs[2:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, unused: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        free, base, q, half = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _frame_backward(grad, free, base, q, half, *ctx.rest), None, None, None
        with torch.enable_grad(), without_autocast(grad):
            leaf = free if free.requires_grad else free.detach().requires_grad_()
            value = _frame_composite(leaf, base, ctx.rest[0])
            (result,) = torch.autograd.grad(value, leaf, grad, create_graph=True)
        return result, None, None, None


def skew_frame(free: Tensor, base: Tensor, kind: Map, budget: int = 7) -> Tensor:
    """``f(X Q₀ᵀ − Q₀ Xᵀ) Q₀`` for a tall frame ``Q₀``; a wide one is transposed.

    Args:
        free: ``X``, ``(..., m, n)``, any size: the map turns by ``‖A‖₂`` at most.
        base: ``Q₀``, ``(..., m, n)`` with orthonormal columns (rows, if wide); not differentiated.
        kind: ``"exponential"``, or ``"cayley"``, which is cheaper and never turns by π.
        budget: squarings that the exponential may use; beyond (and for very large Cayley arguments) the eigenvectors of
            ``A`` are used, in complex128 and without regard to the thin shape.

    Returns:
        ``(..., m, n)``, orthogonal; ``float16`` and ``bfloat16`` are computed in ``float32`` and rounded once.

    Raises:
        ValueError: NaN or Inf in ``free``, a ``base`` of other sides, an unknown ``kind``.
        TypeError: not real floating point.
    """
    if free.dtype not in (torch.float32, torch.float64):
        check_floating("free", free)
        return skew_frame(free.float(), base.float(), kind, budget).to(free.dtype)
    if kind not in ("exponential", "cayley"):
        raise ValueError(f"kind must be 'exponential' or 'cayley', got {kind!r}")
    if free.shape[-2:] != base.shape[-2:] or free.ndim < 2:
        check_matrix("free", free)
        raise ValueError(f"base must have the sides of free, {tuple(free.shape)}, got {tuple(base.shape)}")
    base = in_dtype(base, free.dtype)
    if free.numel() == 0:
        return free.clone()
    if free.shape[-2] < free.shape[-1]:
        return skew_frame(free.mT, base.mT, kind, budget).mT
    with without_autocast(free):
        if not torch.compiler.is_compiling() and differentiates_forward():
            return _frame_composite(free, base, kind)
        frame: Tensor = apply(_Frame, free, base, kind, budget)[0]
        return frame


@with_pullback_in_working_precision
def skew_frame_with_pullback(free: Tensor, base: Tensor, kind: Map, budget: int = 7) -> tuple[Tensor, Pullback]:
    """:func:`skew_frame` and the map from a gradient to that of ``free``, neither recorded by autograd."""
    if free.shape[-2] < free.shape[-1]:
        return transposed(*skew_frame_with_pullback(free.mT, base.mT, kind, budget))
    base = base.to(free.dtype)
    q, half = _frame_forward(free, base, kind, budget)
    return q, lambda grad: _frame_backward(grad, free, base, q, half, kind, budget)
