"""The Sylvester equation ``H K + K H = C`` with symmetric ``H``: the heart of the polar factor's derivative."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._functions import apply, needs_forward_rule
from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg._products import add_anticommutator, add_product, add_product_, commutator, product
from orthogonium.linalg.minimax import Quintic, greedy_quintics, inverse_coefficients

# Rounding of the products about it, in units of eps: no iteration need be better.
_ROUNDING = 20

# Up to this spread, 6 to 8 products, a polynomial for the inverse is shorter than another step by the sign, 7 of them.
_NEAR = 0.35

# Spreads, in powers of two, for which coefficients are computed.
_RADII = 8


def divided_by_sums(matrix: Tensor, values: Tensor, with_zeros: bool = True) -> Tensor:
    """``matrix[i, j] / (values[i] + values[j])``, and zero where that sum is zero."""
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    return torch.where(sums == 0, 0.0, matrix / sums) if with_zeros else matrix / sums


@opaque(lambda symmetric, right: torch.empty_like(right))
def _lyapunov_solve(symmetric: Tensor, right: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(symmetric)
    rank_floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    values = torch.where(values > rank_floor, values, 0.0)
    return basis @ divided_by_sums(basis.mT @ right @ basis, values) @ basis.mT


class _Lyapunov(Function):
    """The operator is self-adjoint in ``K``, so that its derivative is again a Lyapunov solve."""

    @staticmethod
    def forward(symmetric: Tensor, right: Tensor) -> Tensor:
        return _lyapunov_solve(symmetric, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        symmetric, solution = ctx.saved_tensors
        with without_autocast(grad):
            dual = lyapunov(symmetric, grad)
            return -(dual @ solution.mT + solution.mT @ dual), dual

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        batched = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        return lyapunov(*batched), 0


class _DualLyapunov(_Lyapunov):
    """With a forward-mode rule, which ``torch.compile`` does not accept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _Lyapunov.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def jvp(ctx: Any, symmetric_tangent: Tensor | None, right_tangent: Tensor | None) -> Tensor:
        symmetric, solution = ctx.saved_tensors
        right = torch.zeros_like(solution) if right_tangent is None else right_tangent
        if symmetric_tangent is not None:
            right = right - symmetric_tangent @ solution - solution @ symmetric_tangent
        return lyapunov(symmetric, right)


def lyapunov(symmetric: Tensor, right: Tensor) -> Tensor:
    """The solution ``K`` of ``H K + K H = C``, differentiable any number of times.

    In the eigenbasis of ``H`` the solution is ``C[i, j] / (λᵢ + λⱼ)``: sums, not differences, so nothing
    blows up where eigenvalues repeat. Pairs of eigenvalues that are both zero get the solution zero.

    Args:
        symmetric: ``H``, ``(..., n, n)``, positive semidefinite.
        right: ``C``, ``(..., n, n)``.

    Returns:
        ``(..., n, n)``.
    """
    solution: Tensor = apply(_DualLyapunov if needs_forward_rule() else _Lyapunov, symmetric, right)
    return solution


def skew_lyapunov_near_identity(deviation: Tensor, skew: Tensor, spread: float) -> Tensor:
    """``K`` for ``H = I + F`` given ``F`` with ``‖F‖₂ ≤ spread < 1/2`` and skew ``C``, by products alone.

    With ``𝓕 K = (F K + K F) / 2``, an operator whose spectrum lies within ``± spread`` as well, the equation is
    ``K + 𝓕 K = C / 2``. A polynomial for ``1 / (1 + x)`` in ``𝓕`` solves it to the rounding errors of the products.
    """
    tolerance = _ROUNDING * torch.finfo(skew.dtype).eps
    if spread <= tolerance:
        return 0.5 * skew
    exponent = math.ceil(_RADII * math.log2(spread)) / _RADII  # one of few, so that coefficients are remembered
    *rest, leading = inverse_coefficients(2.0**exponent, tolerance)
    if not rest:
        return 0.5 * skew
    solution, scale = skew, 0.25 * leading
    for coefficient in reversed(rest):  # Horner's rule
        solution = add_anticommutator(skew, deviation, solution, scale, 0.5 * coefficient, skew=True)
        scale = 0.5
    return solution


def skew_lyapunov_by_sign(symmetric: Tensor, skew: Tensor, lowest: float) -> Tensor:
    """``K`` by a fixed number of products, for ``H`` with eigenvalues in ``[lowest, 1]`` and skew ``C``.

    The matrix sign of ``[[H, C], [0, −H]]`` is ``[[I, 2 K'], [0, −I]]`` with ``H K' + K' H = C``. The odd polynomials
    that take ``H`` to the identity therefore carry the solution along in the upper right block. On the last part of
    the way the polynomials of :func:`skew_lyapunov_near_identity` are shorter.

    Source: Roberts, Int. J. Control 32(4), 1980; Kenney and Laub, SIAM J. Matrix Anal. Appl. 12(2), 1991.
    """
    schedule, center, spread = _way_near_identity(lowest)
    for a, b, c in schedule:
        square = product(symmetric, symmetric)
        factor = add_product(square, square, square, scale=c, addend_scale=b)
        mixed = commutator(symmetric, skew)
        mixed = add_anticommutator(mixed, square, mixed, c, b, skew=False)
        skew = add_product(skew, skew, factor, scale=1.0, addend_scale=a)
        skew = add_product_(skew, symmetric, mixed, scale=1.0)
        symmetric = add_product(symmetric, symmetric, factor, scale=1.0, addend_scale=a)
    deviation = symmetric / center
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return skew_lyapunov_near_identity(deviation, skew / center, spread)


@lru_cache
def _way_near_identity(lowest: float) -> tuple[tuple[Quintic, ...], float, float]:
    """Quintics for ``[lowest, 1]``, and the center and relative spread of where they lead."""
    schedule, low, high = [], lowest, 1.0
    for coefficients, following_low, following_high in greedy_quintics(lowest):
        if high - low <= _NEAR * (high + low):
            break
        schedule.append(coefficients)
        low, high = following_low, following_high
    return tuple(schedule), (low + high) / 2, (high - low) / (high + low)
