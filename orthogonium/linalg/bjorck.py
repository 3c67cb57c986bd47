"""The classical Björck iteration, and the derivative it has at its fixed point."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._functions import apply, needs_forward_rule
from orthogonium.linalg._precision import in_working_precision, smallest_safe_scale, without_autocast
from orthogonium.linalg._pullback import Pullback, transposed, with_pullback_in_working_precision
from orthogonium.linalg.polar import polar_value


@in_working_precision
def bjorck(matrix: Tensor, beta: float = 0.5, steps: int = 12) -> Tensor:
    """``steps`` times ``X → (1 + β) X − β X Xᵀ X``, exactly as written: a reference, and a cheap contraction.

    A singular value ``s`` becomes ``s + β s (1 − s²)``. Values in ``(0, √(1 + 1/β))`` stay positive and tend to one,
    quadratically for β = 1/2 and by a factor ``1 − 2β`` otherwise, so the limit is the polar factor for every β in
    (0, 1). :func:`polar` reaches that limit for every matrix and in less time.

    Args:
        matrix: ``(..., m, n)``.
        beta: in ``(0, 1)``.
        steps: the number of steps.

    Returns:
        ``(..., m, n)``.

    Source:
        Björck and Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", SIAM J.
        Numer. Anal. 8(2), 1971.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return bjorck(matrix.mT, beta, steps).mT
    for _ in range(steps):
        matrix = (1 + beta) * matrix - beta * (matrix @ matrix.mT) @ matrix
    return matrix


class _PassThrough(Function):
    """The polar factor's value with the derivative that the iteration would have, were ``W`` a multiple of it."""

    @staticmethod
    def forward(matrix: Tensor, value: Tensor, damping: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        matrix, _, ctx.damping = inputs
        ctx.save_for_backward(output, _scale(matrix))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        with without_autocast(grad):
            if q.shape[-2] > q.shape[-1]:
                q, grad, scale = q.mT, grad.mT, scale.mT
                return _damped(q, grad, ctx.damping, scale).mT, None, None
            return _damped(q, grad, ctx.damping, scale), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], matrix: Tensor, value: Tensor, damping: float
    ) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        assert in_dims[1] is not None
        return _apply(matrix.movedim(in_dims[0], 0), value.movedim(in_dims[1], 0), damping), 0


class _DualPassThrough(_PassThrough):
    """With a forward-mode rule, which ``torch.compile`` does not accept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _PassThrough.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *unused: None) -> Tensor:
        return _PassThrough.backward(ctx, tangent)[0]  # a self-adjoint map


def _apply(matrix: Tensor, value: Tensor, damping: float) -> Tensor:
    handed: Tensor = apply(_DualPassThrough if needs_forward_rule() else _PassThrough, matrix, value, damping)
    return handed


def _scale(matrix: Tensor) -> Tensor:
    """The singular values' quadratic mean, one where that could not be divided by."""
    scale = torch.linalg.matrix_norm(matrix, keepdim=True) / max(min(matrix.shape[-2:]), 1) ** 0.5
    return torch.where(scale > smallest_safe_scale(matrix.dtype), scale, 1.0)


def _damped(q: Tensor, grad: Tensor, damping: float, scale: Tensor) -> Tensor:
    cross = grad @ q.mT
    return (grad - (0.5 * damping) * (cross + cross.mT) @ q) / scale


@in_working_precision
def polar_pass_through(matrix: Tensor, beta: float = 0.5, steps: int = 12) -> Tensor:
    """The polar factor with an approximate derivative of two products and no saved factor.

    The gradient is the one that ``steps`` Björck steps have at their fixed point: motions along the orthogonal matrices
    pass unchanged, and the symmetric part ``sym(G Qᵀ) Q`` is multiplied by ``(1 − 2β)^steps`` (zero for β = 1/2). It is
    exact where ``matrix`` is a multiple of an orthogonal matrix and β = 1/2, and degrades with its condition number.
    """
    return _apply(matrix, polar_value(matrix, steps), _damping(beta, steps))


@with_pullback_in_working_precision
def polar_pass_through_with_pullback(matrix: Tensor, beta: float, steps: int) -> tuple[Tensor, Pullback]:
    """The same and the map from a gradient to that of ``matrix``, neither recorded by autograd."""
    if matrix.shape[-2] > matrix.shape[-1]:
        return transposed(*polar_pass_through_with_pullback(matrix.mT, beta, steps))
    q, scale, damping = polar_value(matrix, steps), _scale(matrix), _damping(beta, steps)

    def pullback(grad: Tensor) -> Tensor:
        with without_autocast(grad):
            return _damped(q, grad, damping, scale)

    return q, pullback


def _damping(beta: float, steps: int) -> float:
    return 1.0 - (1.0 - 2.0 * beta) ** steps
