"""The polar factor of a matrix that was orthogonal one small step ago: fewer products, checked afterwards."""

from functools import lru_cache

import torch
from torch import Tensor

from orthogonium.linalg._precision import in_working_precision
from orthogonium.linalg._products import symmetric_product
from orthogonium.linalg.minimax import inverse_sqrt_coefficients, inverse_sqrt_radius
from orthogonium.linalg.polar import polar

_SMALLEST = 192  # below, calls cost more than products, and `polar` is as good
_POWERS, _MARGIN = 4, 1.2
_REACH = 0.4  # spread of W Wᵀ around its mean beyond which more general ways are shorter


@in_working_precision
def polar_after_step(matrix: Tensor) -> Tensor:
    """:func:`~orthogonium.linalg.polar` for matrices near orthogonal ones, forward only.

    ``Q = p(E) W / √c`` with ``c (I + E) = W Wᵀ`` and the polynomial ``p(x) ≈ (1 + x)^(−½)``, as there. Two things make
    it shorter: every product but the last has a symmetric result, of which only one half need be computed,
    and the degree is chosen by an estimate of ``‖E‖₂`` (power iteration, a fifth added) where a certain bound would
    be two or three times larger. What the estimate left uncertain is checked afterwards on a vector,
    and where ``Q`` is not orthogonal, or ``W`` was not near, :func:`~orthogonium.linalg.polar` takes over.

    Args:
        matrix: ``(..., m, n)``; any, though time is gained only near orthogonal ones.

    Returns:
        ``(..., m, n)``, not recorded by autograd.

    Raises:
        ValueError: fewer than two dimensions, or NaN or Inf.
        TypeError: not real floating point.
    """
    with torch.no_grad():
        if matrix.shape[-2] > matrix.shape[-1]:
            return _wide(matrix.mT).mT
        return _wide(matrix)


def _wide(matrix: Tensor) -> Tensor:
    rows, eps = matrix.shape[-2], torch.finfo(matrix.dtype).eps
    if rows < _SMALLEST or matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return polar(matrix)
    error = symmetric_product(matrix, matrix.mT)
    mean = error.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool(((mean > 0.25) & (mean < 4)).all()):  # also when NaN
        return polar(matrix)
    error /= mean[..., None, None]
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    # ‖E‖_F ≤ √m ‖E‖₂: far matrices are sorted out before more is spent
    size = torch.linalg.matrix_norm(error)
    if not bool((size <= _REACH * rows**0.5).all()):
        return polar(matrix)
    square = symmetric_product(error, error)
    spread = _MARGIN * float(_largest(square, size).amax()) ** 0.5
    degrees = [d for d in (2, 4, 6) if spread <= inverse_sqrt_radius(d, 2 * eps)]
    if not degrees:
        return polar(matrix)
    coefficients = inverse_sqrt_coefficients(degrees[0], inverse_sqrt_radius(degrees[0], 2 * eps))
    inverse = _polynomial(error, square, coefficients)
    inverse /= mean.sqrt()[..., None, None]
    q = inverse @ matrix
    probe = _probe(rows, matrix.dtype).expand(matrix.shape[:-1])
    missing = torch.linalg.vector_norm(_times(q, _times(q.mT, probe)) - probe, dim=-1)
    # rounding alone leaves a Frobenius norm of about n eps / 4
    return q if bool((missing <= max(8 * rows**0.5, 0.5 * rows) * eps).all()) else polar(q)


def _polynomial(error: Tensor, square: Tensor, c: tuple[float, ...]) -> Tensor:
    """``Σ cᵢ Eⁱ`` of degree 2, 4 or 6 with none, one or two symmetric products."""
    result = c[-1] * square
    for i in range(len(c) - 3, -1, -2):  # ... + c[i] I + c[i + 1] E, and times E² unless it is the last
        result.add_(error, alpha=c[i + 1])
        result.diagonal(dim1=-2, dim2=-1).add_(c[i])
        if i:
            result = symmetric_product(square, result)
    return result


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A product with one vector per matrix; for one matrix ten times as fast as with a thin block."""
    return matrix @ vector if matrix.ndim == 2 else (matrix @ vector[..., None])[..., 0]


@lru_cache(maxsize=32)
def _probe(rows: int, dtype: torch.dtype) -> Tensor:
    """A fixed vector of entries of variance one without structure."""
    phases = torch.arange(1, rows + 1, dtype=torch.float64)
    return (2**0.5 * torch.sin(phases.square())).to(dtype)


def _largest(square: Tensor, size: Tensor) -> Tensor:
    """The largest eigenvalue of ``E²``, from below; ``size`` is ``‖E‖_F``, which keeps the powers in range."""
    scale = size.square()[..., None].clamp_min(torch.finfo(square.dtype).tiny)
    x = _probe(square.shape[-1], square.dtype).expand(square.shape[:-1])
    for _ in range(_POWERS):
        x = _times(square, x) / scale
    found = torch.linalg.vector_norm(_times(square, x), dim=-1) / torch.linalg.vector_norm(x, dim=-1)
    return found.nan_to_num(0.0)
