"""Roads to the polar factor of a wide matrix; which one is taken depends on how far it is from orthogonal.

Each returns ``(Q, basis, stretch, route)``, the last three for the derivative; ``route`` is a pair on the CPU:

| route | taken when | ``basis`` | ``stretch`` |
|---|---|---|---|
| ``NEAR``, a bound on ``‖W Wᵀ/c − I‖₂`` | that bound is small | ``H⁻¹`` (wide), nothing (square) | ``√c`` |
| ``EIGENBASIS``, 0 | otherwise, on a CPU | eigenvectors ``V`` of ``W Wᵀ`` | singular values, or ``Vᵀ W`` |
| ``EIGENBASIS``, 1 | ``W`` is singular to rounding or of extreme scale | the same | the same, null rows 0 |
| ``PRODUCTS``, least ``σ/‖W‖_F`` covered | otherwise, on a GPU | nothing | nothing |
| ``SHIFTED``, the same | a CUDA graph is captured, so that nothing can be looked at | nothing | nothing |

``Vᵀ W``, of which the rows have the singular values as norms, is kept where it saves a product: for matrices less
than twice as wide as high (:func:`keeps_rotated`).
"""

import torch
from torch import Tensor

from orthogonium.linalg._factorizations import eigenbasis
from orthogonium.linalg._figures import frobenius, largest, least_ratio, smallest, trace
from orthogonium.linalg._precision import (
    raise_if_not_finite,
    scaled_to_one,
    smallest_safe_scale,
    times_power_of_two,
)
from orthogonium.linalg._products import newton_schulz, symmetric_product
from orthogonium.linalg.minimax import (
    inverse_sqrt_coefficients,
    inverse_sqrt_radius,
    matrix_polynomial,
    polar_schedule,
)

NEAR, EIGENBASIS, PRODUCTS, SHIFTED = 0.0, 1.0, 2.0, 3.0
SVD_ONLY = -1  # as a budget

Routed = tuple[Tensor, Tensor, Tensor, Tensor]

_DEGREES = {torch.float32: (2, 4, 6, 8), torch.float64: (2, 4, 6, 8, 11, 14)}
_PRODUCTS = {2: 0, 4: 1, 6: 2, 8: 3, 11: 4, 14: 5}  # beyond the square, in `matrix_polynomial`

# A Gram matrix squares the condition number κ: its eigenvectors are good to eps κ². Beyond this ratio of
# eigenvalues the matrix is taken in float64 (from float32) or to the SVD (from float64).
_GRAM_RATIO = 1e-3
_GRAM_RATIO_DOUBLE = 1e-8

# The first attempt by minimax steps covers singular values down to this share of the Frobenius norm.
_LOWEST = 1e-3
_ATTEMPTS = 3


def keeps_rotated(matrix: Tensor) -> bool:
    """Whether ``stretch`` has the shape of ``matrix`` and not of its singular values."""
    return matrix.shape[-1] < 2 * matrix.shape[-2]


def _route(kind: float, parameter: float) -> Tensor:
    return torch.tensor((kind, parameter), dtype=torch.float64)


_EIGENBASIS_ROUTE = _route(EIGENBASIS, 0)


def nearest_orthogonal(matrix: Tensor, budget: int) -> Routed:
    """The polar factor of ``(..., m, n)``, ``m ≤ n``, float32 or float64, by the cheapest road that is safe."""
    if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
        return by_fixed_schedule(matrix)
    if budget == SVD_ONLY:
        raise_if_not_finite("matrix", matrix)
        return by_svd(matrix)
    gram = symmetric_product(matrix, matrix.mT)
    squares = trace(gram)
    safe = torch.finfo(matrix.dtype).tiny ** 0.75
    if not (safe <= smallest(squares) and largest(squares) <= 1 / safe):  # also when NaN
        raise_if_not_finite("matrix", matrix)
        return by_svd(matrix)
    near = _near(matrix, gram, squares, budget)
    if near is not None:
        return near
    return by_minimax(matrix) if matrix.is_cuda else by_eigenbasis(matrix, gram)


def _near(matrix: Tensor, gram: Tensor, squares: Tensor, budget: int) -> Routed | None:
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
    # ‖E‖_F² = ‖W Wᵀ‖_F²/c² − m sorts most matrices out at the price of one norm; ‖E²‖_F^½ ≥ ‖E‖_F/m^¼
    excess = (rows * largest(frobenius(gram) / squares)) ** 2 - rows
    if not excess <= 1.1 * (reach * rows**0.25) ** 2:
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
        inverse, _ = _nothing(matrix)
    if keeps_rotated(matrix):
        stretch = scale[..., None, None].expand(matrix.shape)
    else:
        stretch = scale[..., None].expand(matrix.shape[:-1])
    return q, inverse, stretch, _route(NEAR, spread)


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
        stretch = basis.mT @ wide
        q = basis @ (stretch / values[..., :, None])
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
    return q, u.to(matrix.dtype), stretch.to(matrix.dtype), _route(EIGENBASIS, 1)


def by_minimax(matrix: Tensor) -> Routed:
    """Minimax steps on ``W`` itself: products only, for devices on which a factorisation is slow.

    The first attempt covers ``σ ≥ 1e-3 ‖W‖_F``. A longer schedule amplifies the rounding errors of large singular
    values (its first polynomials are steep there), so the next ones run in float64, and then the SVD takes over.
    """
    tolerance = 1e-2  # two Newton–Schulz steps take this to rounding
    for attempt in range(1, _ATTEMPTS + 1):
        work = matrix if attempt == 1 else matrix.double()
        lowest = _LOWEST**attempt
        q = minimax_steps(work / torch.linalg.matrix_norm(work, keepdim=True), lowest, torch.finfo(work.dtype).eps)
        error = symmetric_product(q, q.mT)
        error.diagonal(dim1=-2, dim2=-1).sub_(1)
        left = largest(frobenius(error))
        if left <= tolerance:
            q = newton_schulz(newton_schulz(q)).to(matrix.dtype)
            # more than rounding is left of values a little below `lowest`: the derivative's schedule has to cover them
            covered = lowest if left <= 4 * matrix.shape[-2] * torch.finfo(matrix.dtype).eps else lowest / 5
            return q, *_nothing(matrix), _route(PRODUCTS, covered)
    return by_svd(matrix)


def by_fixed_schedule(matrix: Tensor) -> Routed:
    """A number of minimax steps that depends on the dtype alone; nothing is read back from the device.

    ``eps ‖W‖_F`` times the identity is added first: it is below rounding for a matrix of full rank, and completes a
    singular one. Computed in float64, see :func:`by_minimax`. NaN and Inf pass through.
    """
    eps = torch.finfo(matrix.dtype).eps
    scaled, _ = scaled_to_one(matrix.double())
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    q = scaled / torch.where(norm > 0, norm, 1.0)
    q.diagonal(dim1=-2, dim2=-1).add_(eps)
    lowest = eps / 100
    q = minimax_steps(q, lowest, torch.finfo(q.dtype).eps)
    return newton_schulz(q).to(matrix.dtype), *_nothing(matrix), _route(SHIFTED, lowest)


def minimax_steps(matrix: Tensor, lowest: float, tolerance: float) -> Tensor:
    """The minimax schedule that takes singular values in ``[lowest, 1]`` to within ``tolerance`` of one."""
    for a, b, c in polar_schedule(lowest, tolerance):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * (gram @ gram)) @ matrix
    return matrix


def _nothing(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Place-holders of the right shapes that take no memory."""
    zero = matrix.new_zeros(())
    stretch = matrix.shape if keeps_rotated(matrix) else matrix.shape[:-1]
    return zero.expand(*matrix.shape[:-1], matrix.shape[-2]), zero.expand(stretch)
