"""``W = L Q`` with ``L`` lower triangular and a non-negative diagonal: one derivative for every way to compute it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._constants import half_lower
from orthogonium.linalg._factorizations import gram_factor
from orthogonium.linalg._figures import frobenius, largest
from orthogonium.linalg._functions import apply, needs_forward_rule
from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._precision import (
    raise_if_not_finite,
    scaled_to_one,
    smallest_safe_scale,
    times_power_of_two,
    without_autocast,
)
from orthogonium.linalg._products import (
    add_product,
    lower_gram_error,
    roomy_product,
    skew_part,
    upper_times,
)
from orthogonium.linalg._pullback import Pullback, transposed, with_pullback_in_working_precision

Factors = tuple[Tensor, Tensor]
_SOLVED = 128  # side from which on a triangular system costs less than a product with its matrix
_ORDINARY = torch.tensor(False)  # see `_lq_forward`


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """``L⁻¹ B`` through the transposed system, which spares LAPACK two changes of layout for row-major ``B``."""
    return torch.linalg.solve_triangular(lower.mT, right.mT, upper=True, left=False).mT


def solve_lower_transposed(lower: Tensor, right: Tensor) -> Tensor:
    """``L⁻ᵀ B``, likewise."""
    return torch.linalg.solve_triangular(lower, right.mT, upper=False, left=False).mT


def in_ordinary_range(matrix: Tensor) -> bool:
    """Whether squares of the entries neither overflow nor vanish. NaN and Inf are reported by an error."""
    low, high = torch.aminmax(torch.linalg.vector_norm(matrix, float("inf"), dim=(-2, -1)))
    safe = torch.finfo(matrix.dtype).tiny ** 0.375
    if safe <= low.item() and high.item() <= 1 / safe:
        return True
    raise_if_not_finite("matrix", matrix)
    return False


def householder(matrix: Tensor) -> Factors:
    """``(Q, L)`` by Householder reflections: backward stable, any rank, the diagonal of ``L`` made non-negative."""
    if not in_ordinary_range(matrix):
        scaled, exponent = scaled_to_one(matrix)
        q, lower = _signed_qr(scaled)
        return q, times_power_of_two(lower, exponent)
    return _signed_qr(matrix)


def _signed_qr(matrix: Tensor) -> Factors:
    q, r = torch.linalg.qr(matrix.mT)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(matrix.dtype)
    return (q * signs[..., None, :]).mT, (r * signs[..., :, None]).mT


def _verified_cholesky(matrix: Tensor, stable: bool) -> Factors | None:
    """One pass leaves ``E = Q Qᵀ − I`` of size ``eps κ²``; where that is small, it is corrected to first order.

    What the correction leaves is ``‖E‖²``. ``None`` when ``E`` is too large, which is also how a failed
    factorisation, entries out of range, NaN and Inf show. ``stable`` asks for ``E`` near rounding level: then ``κ``
    was harmless, and ``L`` is as good as ``Q``.
    """
    lower = gram_factor(matrix)
    q = solve_lower(lower, matrix)
    step = _halved_lower_(lower_gram_error(q))
    eps = torch.finfo(matrix.dtype).eps
    limit = 16 * eps * matrix.shape[-2] if stable else eps**0.5
    if not 2 * largest(frobenius(step)) <= limit:  # E = H + Hᵀ
        return None
    moved = add_product(lower, lower, step, scale=1.0) if stable else lower
    if matrix.shape[-2] < _SOLVED or matrix.is_cuda:
        return add_product(q, step, q, scale=-1.0), moved
    step.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return solve_lower(step, q), moved  # (I + H)⁻¹ = I − H + H², at two thirds of the price of a product


def _halved_lower_(matrix: Tensor) -> Tensor:
    """In place: zero above the diagonal, and half of what is on it."""
    mask = half_lower(matrix.shape[-1], matrix)
    if mask is not None:
        return matrix.mul_(mask)
    matrix.tril_().diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return matrix


def _fake_forward(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty((*matrix.shape[:-1], matrix.shape[-2])),
        torch.empty((), dtype=torch.bool),
    )


@opaque(_fake_forward, by_columns=lambda matrix, method: () if method == "householder" else (1,))
def _lq_forward(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q, L, s)``; ``s``, on the CPU, says that ``L`` may be singular or of extreme scale."""
    if matrix.ndim > 3:  # products of two batch dimensions cost half again as much
        q, lower, special = _lq_forward(matrix.flatten(0, -3), method)
        batch = matrix.shape[:-2]
        return q.unflatten(0, batch), lower.unflatten(0, batch), special
    if method == "householder":
        return *householder(matrix), ~_ORDINARY
    stable = method == "cholesky_stable"
    factors = _verified_cholesky(matrix, stable)
    if factors is not None:
        return *factors, _ORDINARY.clone()
    double = matrix.double()
    factors = _verified_cholesky(double, stable) if matrix.dtype == torch.float32 else None
    q, lower = householder(double) if factors is None else factors
    return q.to(matrix.dtype), lower.to(matrix.dtype), ~_ORDINARY


@opaque(lambda grad, q, lower, special: torch.empty_like(grad, memory_format=torch.contiguous_format))
def _lq_backward(grad: Tensor, q: Tensor, lower: Tensor, special: Tensor) -> Tensor:
    """``L⁻ᵀ (G − S Q)`` with ``S`` the symmetric matrix whose lower triangle is that of ``C = G Qᵀ``.

    Rows that depend on earlier ones (a zero on the diagonal of ``L``, to rounding) get the gradient zero, and a zero
    matrix that of ``L = I``.
    """
    if grad.ndim > 3:
        flat = _lq_backward(*(t.reshape(-1, *t.shape[-2:]) for t in (grad, q, lower)), special)
        return flat.reshape(grad.shape)
    with without_autocast(grad):
        if q.shape[-2] == q.shape[-1]:  # then G = C Q
            right = upper_times(skew_part(roomy_product(grad, q.mT)).triu_(1), q)
        else:
            half = _halved_lower_(roomy_product(grad, q.mT))
            right = add_product(grad, half + half.mT, q, scale=-1.0)
        if special.item():
            lower, kept = _regular(lower)
            right = torch.where(kept, right, 0.0)
        return solve_lower_transposed(lower, right)


def _regular(lower: Tensor) -> Factors:
    """``L`` without dependent rows, and enlarged where its inverse would overflow; ``(..., n, 1)``, which rows count.

    All rows of a zero matrix do.
    """
    diagonal = lower.detach().diagonal(dim1=-2, dim2=-1)
    largest = lower.detach().abs().amax((-2, -1))[..., None]
    dependent = diagonal <= torch.finfo(lower.dtype).eps * lower.shape[-1] * largest
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    lower = torch.where(dependent[..., None, :], identity, lower)
    safe = torch.full_like(largest, smallest_safe_scale(lower.dtype))
    scale = torch.where(largest > 0, safe / largest, 1.0).clamp_min(1.0)
    return lower * scale[..., None], (~dependent | (largest == 0))[..., :, None]


def _may_be_singular(special: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(special)


class _LQ(Function):
    @staticmethod
    def forward(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
        return _lq_forward(matrix, method)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        matrix, q, lower, special = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _lq_backward(grad, q, lower, special), None
        with without_autocast(grad):
            cross = grad @ q.mT
            right = grad - (cross.tril() + cross.tril(-1).mT) @ q
            lower = (matrix @ q.mT).tril()
            if _may_be_singular(special):
                lower, kept = _regular(lower)
                right = torch.where(kept, right, 0.0)
            return solve_lower_transposed(lower, right), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], matrix: Tensor, method: str
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        assert in_dims[0] is not None
        return _apply(matrix.movedim(in_dims[0], 0), method), (0, 0, None)


class _DualLQ(_LQ):
    """With a forward-mode rule, which ``torch.compile`` does not accept."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _LQ.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, unused: None) -> tuple[Tensor, None, None]:
        matrix, q, _, special = ctx.saved_tensors
        lower = (matrix @ q.mT).tril()
        if _may_be_singular(special):
            lower, kept = _regular(lower)
            moved = torch.where(kept, solve_lower(lower, tangent), 0.0)
        else:
            moved = solve_lower(lower, tangent)
        cross = moved @ q.mT
        rotation = cross.triu(1)
        return (rotation - rotation.mT) @ q + moved - cross @ q, None, None


def _apply(matrix: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    factors: tuple[Tensor, Tensor, Tensor] = apply(_DualLQ if needs_forward_rule() else _LQ, matrix, method)
    return factors


def gram_schmidt(matrix: Tensor, method: str) -> Tensor:
    """The Gram–Schmidt factor of the rows of a wide matrix, of the columns of a tall one."""
    if matrix.numel() == 0:
        return matrix.clone()
    if matrix.shape[-2] > matrix.shape[-1]:
        return _apply(matrix.mT, method)[0].mT
    return _apply(matrix, method)[0]


@with_pullback_in_working_precision
def gram_schmidt_with_pullback(matrix: Tensor, method: str) -> tuple[Tensor, Pullback]:
    """The same and the map from a gradient to that of ``matrix``, neither recorded by autograd."""
    if matrix.shape[-2] > matrix.shape[-1]:
        return transposed(*gram_schmidt_with_pullback(matrix.mT, method))
    factors = _lq_forward(matrix, method)
    return factors[0], lambda grad: _lq_backward(grad, *factors)
