"""From a gradient of the polar factor to that of the matrix, by the cheapest way that the forward pass left."""

import torch
from torch import Tensor

from orthogonium.linalg._opaque import opaque
from orthogonium.linalg._polar_record import NEAR, PRODUCTS, SHIFTED
from orthogonium.linalg._precision import in_dtype, smallest_safe_scale, without_autocast
from orthogonium.linalg._products import add_product, product, roomy_product, skew_part, symmetric_product
from orthogonium.linalg.lyapunov import divided_by_sums, skew_lyapunov_by_sign, skew_lyapunov_near_identity


@opaque(lambda grad, matrix, *rest: torch.empty_like(matrix, memory_format=torch.contiguous_format))
def polar_backward(grad: Tensor, matrix: Tensor, q: Tensor, basis: Tensor, stretch: Tensor, route: Tensor) -> Tensor:
    """``K Q + H⁻¹ (G − G Qᵀ Q)`` with ``H K + K H = G Qᵀ − Q Gᵀ``, by the cheapest way that the forward pass left."""
    with without_autocast(grad):
        kind, parameter = route.tolist()
        if kind == NEAR:
            return _near(grad, matrix, q, basis, stretch, parameter)
        if kind in (PRODUCTS, SHIFTED):
            return _by_products(grad, matrix, q, stretch, parameter, shifted=kind == SHIFTED)
        return _eigenbasis(grad, q, basis, stretch, special=parameter > 0)


def _near(grad: Tensor, matrix: Tensor, q: Tensor, inverse: Tensor, stretch: Tensor, spread: float) -> Tensor:
    """``H`` is close to ``c I``: a polynomial instead of a factorisation.

    The eigenvalues of ``H / c`` lie in ``[√(1 − e), √(1 + e)]``.
    """
    low, high = (1 - spread) ** 0.5, (1 + spread) ** 0.5
    spread = (high - low) / (high + low)
    cross = roomy_product(grad, q.mT)
    skew = skew_part(cross)
    scale = _scale(stretch, matrix)
    if matrix.shape[-2] == matrix.shape[-1]:
        center = 0.5 * (high + low) * scale
        deviation = symmetric_product(matrix, q.mT).div_(center)
        deviation.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return skew_lyapunov_near_identity(deviation, skew.div_(center), spread) @ q
    # multiplied by P = H⁻¹ from both sides, the equation reads P K + K P = P C P, and P is at hand
    center = 0.5 * (1 / high + 1 / low) / scale
    deviation = inverse / center
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    solution = skew_lyapunov_near_identity(deviation, inverse @ (skew / center) @ inverse, spread)
    return add_product(inverse @ grad, solution.sub_(inverse @ cross), q, scale=1.0)


def _eigenbasis(grad: Tensor, q: Tensor, basis: Tensor, stretch: Tensor, special: bool) -> Tensor:
    """``H = V diag(σ) Vᵀ``: the Lyapunov equation is a division by ``σᵢ + σⱼ``.

    Null directions (``special``) were completed by convention and have no derivative of their own.
    """
    if stretch.ndim == basis.ndim:
        values = _row_norms_of_any_scale(stretch) if special else torch.linalg.vector_norm(stretch, dim=-1)
    else:
        values = stretch
    inverse = values.reciprocal().unsqueeze(-1)
    if special:
        inverse = torch.where(values.unsqueeze(-1) == 0, 0.0, inverse)
    if stretch.ndim < basis.ndim:  # much wider than high: only two products with the long side
        cross = grad @ q.mT
        rotated = basis.mT @ cross @ basis
        if special:
            rotated = torch.where(inverse.mT == 0, 0.0, rotated)
        inner = divided_by_sums(skew_part(rotated), values, special).sub_(inverse * rotated)
        if special:
            inner = torch.where(inverse.mT == 0, 0.0, inner)
        return add_product(symmetric_product(basis, inverse * basis.mT) @ grad, basis @ inner @ basis.mT, q, scale=1.0)
    rotated_q, rotated_grad = inverse * stretch, product(basis.mT, grad)
    rotated = roomy_product(rotated_grad, rotated_q.mT)
    inner = divided_by_sums(skew_part(rotated), values, special)
    if q.shape[-2] == q.shape[-1]:
        return product(basis, product(inner, rotated_q))
    return basis @ ((inner - inverse * rotated) @ rotated_q + inverse * rotated_grad)


def _row_norms_of_any_scale(matrix: Tensor) -> Tensor:
    """Norms of the rows whose squares would leave the range of the type."""
    largest = matrix.abs().amax(-1, keepdim=True)
    scaled = matrix / torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(scaled, dim=-1) * largest[..., 0]


def _by_products(
    grad: Tensor, matrix: Tensor, q: Tensor, stretch: Tensor, lowest: float, shifted: bool = False
) -> Tensor:
    """A sequence of products fixed by ``lowest``: nothing waits for the device.

    Rounding grows with the length of the schedule: beyond one round it is run in float64. A matrix of which nothing is
    known is ``shifted`` by ``lowest``, so that a singular one, too, gets a finite gradient.
    """
    dtype = grad.dtype
    if lowest < 1e-4:
        grad, matrix, q, stretch = grad.double(), matrix.double(), q.double(), stretch.double()
        lowest = max(lowest, 4 * matrix.shape[-2] * torch.finfo(torch.float64).eps)  # above the rounding of H itself
    root = product(matrix, q.mT)  # H, with rounding errors that are not symmetric
    scale = _size_of_any_scale(root) if shifted else _scale(stretch, matrix)
    root = (root + root.mT) * (0.5 / scale)
    grad = grad / scale
    cross = roomy_product(grad, q.mT)
    if shifted:
        root.diagonal(dim1=-2, dim2=-1).add_(lowest)
    result = product(skew_lyapunov_by_sign(root, skew_part(cross), lowest), q)
    if matrix.shape[-2] != matrix.shape[-1]:
        result = result + product(torch.linalg.inv_ex(root).inverse, grad - product(cross, q))
    return in_dtype(result, dtype)


def _scale(stretch: Tensor, matrix: Tensor) -> Tensor:
    """``(..., 1, 1)``: the one figure that is left of a matrix whose singular values are not known."""
    return stretch[..., :1, :1] if stretch.ndim == matrix.ndim else stretch[..., :1, None]


def _size_of_any_scale(stretch: Tensor) -> Tensor:
    """``‖H‖_F``, ``(..., 1, 1)``, of numbers whose squares may leave the range of the type; one for zero."""
    unit = stretch.abs().amax((-2, -1), keepdim=True)
    size = unit * torch.linalg.matrix_norm(stretch / torch.where(unit > 0, unit, 1.0), keepdim=True)
    return torch.where(size > smallest_safe_scale(size.dtype), size, 1.0)
