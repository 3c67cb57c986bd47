"""Roads to the polar factor of a wide matrix; which one is taken depends on how far it is from orthogonal.

Each returns ``(Q, basis, stretch, route)``, the last three for the derivative; ``route`` is a pair on the CPU:

| route | taken when | ``basis`` | ``stretch`` |
|---|---|---|---|
| ``NEAR``, a bound on ``‖W Wᵀ/c − I‖₂`` | that bound is small | ``H⁻¹`` (wide), nothing (square) | ``√c`` |
| ``EIGENBASIS``, 0 | otherwise | eigenvectors ``V`` of ``W Wᵀ`` | singular values, or ``Vᵀ W`` |
| ``EIGENBASIS``, 1 | ``W`` is singular to rounding or of extreme scale | the same | the same, null rows 0 |
| ``PRODUCTS``, least ``σ/scale`` covered | it is of many small ones, or on a GPU | nothing | ``scale ≥ ‖W‖₂`` |
| ``SHIFTED``, least ``σ/‖W‖_F`` covered | a CUDA graph is captured: nothing can be looked at | nothing | nothing |

``Vᵀ W``, of which the rows have the singular values as norms, is kept where it saves a product: for matrices less
than twice as wide as high (:func:`keeps_rotated`).
"""

import torch
from torch import Tensor

from orthogonium.linalg._factorizations import eigenbasis
from orthogonium.linalg._figures import extremes, frobenius, largest, least_ratio, trace
from orthogonium.linalg._polar_by_products import (
    FORWARD,
    WITH_DERIVATIVE,
    by_few_products,
    by_fixed_schedule,
    by_minimax,
    worth_products,
)
from orthogonium.linalg._polar_record import (
    EIGENBASIS,
    NEAR,
    SVD_ONLY,
    Routed,
    as_stretch,
    keeps_rotated,
    nothing,
    route_of,
)
from orthogonium.linalg._precision import (
    raise_if_not_finite,
    scaled_to_one,
    smallest_safe_scale,
    times_power_of_two,
)
from orthogonium.linalg._products import newton_schulz, product, symmetric_product
from orthogonium.linalg.minimax import (
    inverse_sqrt_coefficients,
    inverse_sqrt_radius,
    matrix_polynomial,
)

_DEGREES = {torch.float32: (2, 4, 6, 8), torch.float64: (2, 4, 6, 8, 11, 14)}
_PRODUCTS = {2: 0, 4: 1, 6: 2, 8: 3, 11: 4, 14: 5}  # beyond the square, in `matrix_polynomial`

# A Gram matrix squares the condition number κ: its eigenvectors are good to eps κ². Beyond this ratio of
# eigenvalues the matrix is taken in float64 (from float32) or to the SVD (from float64).
_GRAM_RATIO = 1e-3
_GRAM_RATIO_DOUBLE = 1e-8

# Sums of squares up to which, and from whose inverse on, eighth powers stay in range.
_ORDINARY = 1e8

_EIGENBASIS_ROUTE = route_of(EIGENBASIS, 0)


def nearest_orthogonal(matrix: Tensor, budget: int, derivative: bool = True) -> Routed:
    """The polar factor of ``(..., m, n)``, ``m ≤ n``, float32 or float64, by the cheapest road that is safe.

    Without a ``derivative`` the road back is not looked at, and what is left for it of no use.
    """
    if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
        return by_fixed_schedule(matrix)
    if budget == SVD_ONLY:
        raise_if_not_finite("matrix", matrix)
        return by_svd(matrix)
    gram = symmetric_product(matrix, matrix.mT)
    squares = trace(gram)
    safe = torch.finfo(matrix.dtype).tiny ** 0.75
    least, most = extremes(squares)
    if not (safe <= least and most <= 1 / safe):  # also when NaN
        raise_if_not_finite("matrix", matrix)
        return by_svd(matrix)
    # of the eigenvalues of W Wᵀ, relative to their mean, at the price of one norm
    size = frobenius(gram)
    variance = matrix.shape[-2] * (largest(size) / most if size.ndim == 0 else largest(size / squares)) ** 2 - 1
    found = near(matrix, gram, squares, variance, budget)
    if found is None and worth_products(matrix, derivative) and 1 / _ORDINARY <= least <= most <= _ORDINARY:
        found = by_few_products(matrix, gram, variance, budget, WITH_DERIVATIVE if derivative else FORWARD)
    if found is None and matrix.is_cuda:
        found = by_minimax(matrix)
        return by_svd(matrix) if found is None else found
    return by_eigenbasis(matrix, gram) if found is None else found


def nearest_alone(matrix: Tensor, budget: int) -> Tensor:
    """The factor without what its derivative needs."""
    return nearest_orthogonal(matrix, budget, derivative=False)[0]


def near(matrix: Tensor, gram: Tensor, squares: Tensor, variance: float, budget: int) -> Routed | None:
    """``Q = p(E) W / √c`` with ``c (I + E) = W Wᵀ`` and ``p(x) ≈ (1 + x)^(−½)``, if ``E`` is small enough.

    ``‖E‖₂ ≤ ‖E²‖_F^½`` bounds the spectrum before anything is spent, so the result is known to be orthogonal to
    rounding: neither a loop nor a check.
    """
    rows = matrix.shape[-2]
    tolerance = 2 * torch.finfo(matrix.dtype).eps
    degrees = [d for d in _DEGREES[matrix.dtype] if _PRODUCTS[d] + 1 <= 2 * budget]
    if not degrees:
        return None
    reach = inverse_sqrt_radius(degrees[-1], tolerance)
    # ‖E‖_F² = m · variance sorts most matrices out: ‖E²‖_F^½ ≥ ‖E‖_F/m^¼
    if not variance * rows <= 1.1 * (reach * rows**0.25) ** 2:
        return None
    mean = squares / rows
    error = gram / mean[..., None, None]
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    size = largest(frobenius(error))
    square = symmetric_product(error, error)
    # two bounds on ‖E²‖₂: the Frobenius norm, and the largest row sum, which wins where many values share the error
    bounds = largest(frobenius(square)), largest(torch.linalg.matrix_norm(square, float("inf")))
    spread = min(size, min(bounds) ** 0.5)
    if spread > reach:
        return None
    degree = next(d for d in degrees if spread <= inverse_sqrt_radius(d, tolerance))
    radius = inverse_sqrt_radius(degree, tolerance)
    scale = mean.sqrt()
    inverse = matrix_polynomial(error, inverse_sqrt_coefficients(degree, radius), square)
    inverse /= scale[..., None, None]
    q = inverse @ matrix
    if rows == matrix.shape[-1]:  # the derivative of a square factor does not need H⁻¹
        inverse, _ = nothing(matrix)
    return q, inverse, as_stretch(scale, matrix), route_of(NEAR, spread)


def by_eigenbasis(matrix: Tensor, gram: Tensor) -> Routed:
    """``Q = V diag(1/σ) Vᵀ W`` from the eigenvectors of the small Gram matrix, and one Newton–Schulz step."""
    eigenvalues, basis = eigenbasis(gram)
    ratio = least_ratio(eigenvalues)
    limit = _GRAM_RATIO if gram.dtype == matrix.dtype else _GRAM_RATIO_DOUBLE
    if not ratio >= limit:
        if matrix.dtype == torch.float64 or gram.dtype == torch.float64:
            return by_svd(matrix)
        double = matrix.double()
        return by_eigenbasis(matrix, double @ double.mT)
    wide = matrix if gram.dtype == matrix.dtype else matrix.double()
    values = eigenvalues.sqrt()
    if keeps_rotated(matrix):
        stretch = product(basis.mT, wide)
        q = product(basis, stretch / values.unsqueeze(-1))
    else:
        stretch = values
        q = symmetric_product(basis / values[..., None, :], basis.mT) @ wide
    q = newton_schulz(q)
    if gram.dtype != matrix.dtype:
        q, basis, stretch = q.to(matrix.dtype), basis.to(matrix.dtype), stretch.to(matrix.dtype)
    return q, basis, stretch, _EIGENBASIS_ROUTE.clone()


def by_svd(matrix: Tensor) -> Routed:
    """``U Vᵀ`` of the float64 SVD: any condition number, rank and scale; zero gives the identity's first rows.

    Singular values that are null to rounding are stored as zero, those of a zero matrix as one, and the others no
    smaller than what can be divided by.
    """
    scaled, exponent = scaled_to_one(matrix.double())
    u, values, vh = torch.linalg.svd(scaled, full_matrices=False)
    q = newton_schulz(u @ vh).to(matrix.dtype)
    largest = values[..., :1]
    rounding = max(torch.finfo(matrix.dtype).eps / 2, max(matrix.shape[-2:]) * torch.finfo(torch.float64).eps)
    null = values <= largest * rounding
    values = times_power_of_two(values, exponent[..., 0]).clamp_min(smallest_safe_scale(matrix.dtype))
    values = torch.where(null, 0.0, values)
    values = torch.where(largest > 0, values, 1.0)
    stretch = values[..., :, None] * vh if keeps_rotated(matrix) else values
    return q, u.to(matrix.dtype), stretch.to(matrix.dtype), route_of(EIGENBASIS, 1)
