"""The Sylvester equation ``H K + K H = C`` with symmetric ``H``: the heart of the polar factor's derivative."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._functions import apply, needs_forward_rule
from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg._products import add_roomy_product, skew_part
from orthogonium.linalg.minimax import polar_schedule

# Rounding of the products about it, in units of eps: no iteration need be better.
_ROUNDING = 20


def divided_by_sums(matrix: Tensor, values: Tensor, with_zeros: bool = True) -> Tensor:
    """``matrix[i, j] / (values[i] + values[j])``, and zero where that sum is zero."""
    sums = values[..., :, None] + values[..., None, :]
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

    Chebyshev iteration on ``2 K + (F K + K F) = C``; because ``K`` stays skew, ``K F = −(F K)ᵀ`` and one product
    makes a step. After ``k`` of them the relative error is at most ``1 / T_{k+1}(1 / spread)``, ``T`` the Chebyshev
    polynomials; it ends at the rounding errors of the products.

    Source: Golub and Varga, Numerische Mathematik 3, 1961 (Chebyshev semi-iteration).
    """
    tolerance = _ROUNDING * torch.finfo(skew.dtype).eps
    error, weight = spread, 1.0 / (1.0 - 0.5 * spread * spread)
    if error <= tolerance:
        return 0.5 * skew
    # With K and C skew, the skew part of  a F K + b C + c K  is  a (F K + K F) + 2 b C + 2 c K.
    quarter = 0.25 * weight
    previous, solution = (
        0.5 * skew,
        skew_part(add_roomy_product(skew, deviation, skew, scale=-quarter, addend_scale=quarter)),
    )
    error *= spread * weight / 2
    while error > tolerance:
        weight = 1.0 / (1.0 - 0.25 * spread * spread * weight)
        addend = previous.mul_(0.5 - 0.5 * weight).add_(skew, alpha=0.25 * weight)
        following = skew_part(add_roomy_product(addend, deviation, solution, scale=-0.5 * weight))
        previous, solution = solution, following
        error *= spread * weight / 2
    return solution


def skew_lyapunov_by_sign(symmetric: Tensor, skew: Tensor, lowest: float) -> Tensor:
    """``K`` by a fixed number of products, for ``H`` with eigenvalues in ``[lowest, 1]`` and skew ``C``.

    The matrix sign of ``[[H, C], [0, −H]]`` is ``[[I, 2 K'], [0, −I]]`` with ``H K' + K' H = C``. The odd polynomials
    that take ``H`` to the identity therefore carry the solution along in the upper right block.

    Source: Roberts, Int. J. Control 32(4), 1980; Kenney and Laub, SIAM J. Matrix Anal. Appl. 12(2), 1991.
    """
    for a, b, c in polar_schedule(lowest, torch.finfo(skew.dtype).eps):
        square = symmetric @ symmetric
        half = symmetric @ skew
        mixed = half + half.mT  # H C − C H
        half = square @ mixed
        fourth = c * (half + half.mT) + b * mixed
        factor = b * square + c * (square @ square)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        skew = symmetric @ fourth + skew @ factor
        symmetric = symmetric @ factor
        symmetric = 0.5 * (symmetric + symmetric.mT)
        skew = 0.5 * (skew - skew.mT)
    return 0.5 * skew
