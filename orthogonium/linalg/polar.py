"""The nearest orthogonal matrix, and its exact derivative.

Every full-rank ``W`` (wide, say) is ``W = H Q`` with ``H = (W Wᵀ)^½`` and ``Q`` the orthogonal matrix closest to it in
any unitarily invariant norm (Fan and Hoffman, Proc. AMS 6, 1955). `_polar_routes` computes ``Q`` and `_polar_reverse`
the derivative, which needs ``Q`` and ``H`` alone and not the road that led there; this page joins them for autograd.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._functions import apply, needs_forward_rule
from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._polar_record import EIGENBASIS, SVD_ONLY, keeps_rotated
from orthogonium.linalg._polar_reverse import polar_backward
from orthogonium.linalg._polar_routes import nearest_alone, nearest_orthogonal
from orthogonium.linalg._precision import in_working_precision, without_autocast
from orthogonium.linalg._pullback import Pullback, transposed, with_pullback_in_working_precision
from orthogonium.linalg.lyapunov import lyapunov

_SINGULAR = [EIGENBASIS, 1.0]  # the route of matrices that may be


def _fake_forward(matrix: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = matrix.shape[-2]
    return (
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty((*matrix.shape[:-1], rows)),
        matrix.new_empty(matrix.shape if keeps_rotated(matrix) else matrix.shape[:-1]),
        torch.empty(2, dtype=torch.float64),
    )


_polar_forward = opaque(_fake_forward, by_columns=lambda *args: (1,))(nearest_orthogonal)


class _Polar(Function):
    @staticmethod
    def forward(matrix: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _polar_forward(matrix, budget)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        matrix, q, *rest = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return polar_backward(grad, matrix, q, *rest), None
        return _differentiable_backward(grad, matrix, q, *rest), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], matrix: Tensor, budget: int
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        assert in_dims[0] is not None
        return _apply(matrix.movedim(in_dims[0], 0), budget), (0, 0, 0, None)


class _DualPolar(_Polar):
    """With a forward-mode rule, which ``torch.compile`` does not accept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Polar.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, unused: None) -> tuple[Tensor, None, None, None]:
        # the derivative is a self-adjoint map
        return _differentiable_backward(tangent, *ctx.saved_tensors), None, None, None


def _apply(matrix: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routed: tuple[Tensor, Tensor, Tensor, Tensor] = apply(
        _DualPolar if needs_forward_rule() else _Polar, matrix, budget
    )
    return routed


def _differentiable_backward(
    grad: Tensor, matrix: Tensor, q: Tensor, basis: Tensor, stretch: Tensor, route: Tensor
) -> Tensor:
    """The same derivative from differentiable parts, for second derivatives and ``torch.func``."""
    with without_autocast(grad):
        null = None
        if not torch.compiler.is_compiling() and route.tolist() == _SINGULAR:
            matrix = matrix + torch.where((matrix == 0).all(-1, True).all(-2, True), q, 0.0)
            values = stretch if stretch.ndim < basis.ndim else stretch.abs().amax(-1)
            null = (basis * (values == 0)[..., None, :]) @ basis.mT
            q = q - null @ q
        stretch = matrix @ q.mT
        stretch = 0.5 * (stretch + stretch.mT)
        cross = grad @ q.mT
        result = lyapunov(stretch, cross - cross.mT) @ q
        if matrix.shape[-2] == matrix.shape[-1]:
            return result
        outside = grad - cross @ q
        if null is None:
            return result + torch.linalg.solve_ex(stretch, outside).result
        size = torch.linalg.matrix_norm(stretch.detach(), float("inf"), keepdim=True)
        return result + torch.linalg.solve_ex(stretch + size * null, outside - null @ outside).result


@in_working_precision
def polar(matrix: Tensor, budget: int = 12) -> Tensor:
    """The orthogonal matrix nearest to ``matrix``: its singular values become one, its singular vectors stay.

    Close to an orthogonal matrix (where training lives) a polynomial in ``W Wᵀ`` suffices; elsewhere the eigenvectors
    of the smaller Gram matrix are used (minimax polynomials on a GPU and for many small matrices at once), in float64
    when ``matrix`` is ill conditioned, and the SVD at the very end. A singular matrix has many nearest orthogonal ones:
    the one returned completes ``U Vᵀ`` with the null vectors of the float64 SVD, and zero becomes the identity's first
    rows or columns.

    The derivative is that of the mathematical function, whatever route was taken. It holds at repeated singular
    values; along completed null directions it is taken as zero, and at zero itself as if ``matrix`` were its
    completion.

    Args:
        matrix: ``(..., m, n)``, of any scale and rank.
        budget: up to ``2 · budget`` products are spent on polynomial steps before a factorisation is preferred.

    Returns:
        ``(..., m, n)``, same dtype and device; ``float16`` and ``bfloat16`` are computed in ``float32`` and rounded
        once.

    Raises:
        ValueError: fewer than two dimensions, or NaN or Inf in ``matrix``.
        TypeError: not real floating point.

    Source:
        Higham, *Functions of Matrices*, SIAM 2008, chapter 8; the derivative is Kenney and Laub, SIAM J. Matrix
        Anal. Appl. 12(2), 1991, written for a rectangular matrix.
    """
    return _either_side(matrix, budget)


@in_working_precision
def polar_by_svd(matrix: Tensor) -> Tensor:
    """:func:`polar` by the float64 SVD alone: slower, for reference and for those who trust nothing else."""
    return _either_side(matrix, SVD_ONLY)


_polar_value = opaque(lambda matrix, budget: torch.empty_like(matrix, memory_format=torch.contiguous_format))(
    nearest_alone
)


@in_working_precision
def polar_value(matrix: Tensor, budget: int = 12) -> Tensor:
    """:func:`polar` without a derivative: sooner for squarish float32 matrices with sides of 48 to 256."""
    with torch.no_grad():
        if matrix.numel() == 0 or needs_forward_rule():
            return _either_side(matrix, budget)
        if matrix.shape[-2] > matrix.shape[-1]:
            return _polar_value(matrix.mT, budget).mT
        return _polar_value(matrix, budget)


@with_pullback_in_working_precision
def polar_with_pullback(matrix: Tensor, budget: int = 12) -> tuple[Tensor, Pullback]:
    """:func:`polar` and the map from a gradient to that of ``matrix``, neither recorded by autograd.

    ``budget=-1`` is :func:`polar_by_svd`.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return transposed(*polar_with_pullback(matrix.mT, budget))
    routed = _polar_forward(matrix, budget)
    return routed[0], lambda grad: polar_backward(grad, matrix, *routed)


def _either_side(matrix: Tensor, budget: int) -> Tensor:
    if matrix.numel() == 0:
        return matrix.clone()
    if matrix.shape[-2] > matrix.shape[-1]:
        return _apply(matrix.mT, budget)[0].mT
    return _apply(matrix, budget)[0]
