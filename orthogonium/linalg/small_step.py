"""The polar factor of a matrix that was orthogonal one small step ago: fewer products, checked afterwards."""

from functools import lru_cache

import torch
from torch import Tensor

from orthogonium.linalg._precision import in_working_precision
from orthogonium.linalg.minimax import inverse_sqrt_coefficients, inverse_sqrt_radius
from orthogonium.linalg.polar import polar_value

_SMALLEST = 96  # below, calls cost more than products, and `polar` is as good
_STRIP = 128  # rows of a symmetric product that are made at once
_POWERS, _MARGIN = 4, 1.2
_REACH = 0.4  # spread of W Wᵀ around its mean beyond which more general ways are shorter


@in_working_precision
def polar_after_step(matrix: Tensor) -> Tensor:
    """:func:`~orthogonium.linalg.polar` for matrices near orthogonal ones, forward only.

    ``Q = p(E) W / √c`` with ``c (I + E) = W Wᵀ`` and the polynomial ``p(x) ≈ (1 + x)^(−½)``, as there. Two things make
    it shorter: every product but the last has a symmetric result, of which only one half need be computed,
    and the degree is chosen by ``‖E‖₂``: by a bound from the norms of ``E`` and ``E²`` where no smaller one would
    lower the degree, else by an estimate (power iteration, a fifth added). What an estimate leaves uncertain is checked
    afterwards on a vector, and where ``Q`` is not orthogonal, or ``W`` was not near,
    :func:`~orthogonium.linalg.polar` takes over.
    Matrices of a batch take one after the other, each its own degree, in the same four pieces of memory: at these
    sizes a fresh one costs as much as several passes over it.

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
    rows = matrix.shape[-2]
    if rows < _SMALLEST or matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return polar_value(matrix)
    room = [matrix.new_empty(rows, rows) for _ in range(3)]
    if matrix.ndim == 2:
        return _near(matrix, room)
    result = matrix.new_empty(matrix.shape)
    for found, each in zip(result.flatten(0, -3), matrix.flatten(0, -3), strict=True):
        found.copy_(_near(each, room))
    return result


def _near(matrix: Tensor, room: list[Tensor]) -> Tensor:
    """One wide matrix; ``room`` is three ``(m, m)`` tensors to overwrite."""
    rows, eps = len(matrix), torch.finfo(matrix.dtype).eps
    error, square, result = room
    _symmetric_product(matrix, matrix.mT, error)
    diagonal = error.diagonal()
    mean = float(diagonal.mean())
    if not 0.25 < mean < 4:  # also when NaN
        return polar_value(matrix)
    diagonal.sub_(mean)  # E · mean: powers of the mean go into the coefficients
    # ‖E‖_F ≤ √m ‖E‖₂: far matrices are sorted out before more is spent
    size = float(torch.linalg.vector_norm(error)) / mean
    if not size <= _REACH * rows**0.5:
        return polar_value(matrix)
    _symmetric_product(error, error, square)
    least, most = _range_of_norm(rows, size, float(torch.linalg.vector_norm(square)) / mean**2)
    degree, hoped_for = _degree(most, eps), _degree(_MARGIN * least, eps)
    certain = degree is not None and degree == hoped_for
    if not certain:
        degree = _degree(_MARGIN * _largest(square, size * mean) ** 0.5 / mean, eps)
    if degree is None:
        return polar_value(matrix)
    scaled = inverse_sqrt_coefficients(degree, inverse_sqrt_radius(degree, 2 * eps))
    q = _polynomial_times(matrix, error, square, [c * mean ** (-i - 0.5) for i, c in enumerate(scaled)], result)
    if certain:
        return q
    probe = _probe(rows, matrix.dtype)
    missing = float(torch.linalg.vector_norm(torch.mv(q, torch.mv(q.mT, probe)).sub_(probe)))
    # rounding alone leaves a Frobenius norm of about n eps / 4
    return q if missing <= max(8 * rows**0.5, 0.5 * rows) * eps else polar_value(q)


def _degree(spread: float, eps: float) -> int | None:
    """The lowest that serves ``‖E‖₂ ≤ spread``."""
    return next((d for d in (2, 4, 6) if spread <= inverse_sqrt_radius(d, 2 * eps)), None)


def _range_of_norm(rows: int, size: float, fourth: float) -> tuple[float, float]:
    """Bounds of ``‖E‖₂`` by ``‖E‖_F`` and ``‖E²‖_F``, the sums of second and fourth powers of its eigenvalues.

    Source of the upper one: Wolkowicz and Styan, "Bounds for eigenvalues using traces", Linear Algebra Appl. 29, 1980,
    for ``E²``. The small term is more than rounding takes from the difference.
    """
    if size == 0:
        return 0.0, 0.0
    mean = size**2 / rows
    spread = max(fourth**2 - mean * size**2, 0.0) + 1e-5 * fourth**2
    return fourth / size, (mean + spread**0.5) ** 0.5


def _polynomial_times(matrix: Tensor, error: Tensor, square: Tensor, c: list[float], room: Tensor) -> Tensor:
    """``Σ cᵢ Eⁱ W`` of degree 2, 4 or 6: none, one or two symmetric products, and the one with ``W``.

    The last takes the leading coefficient along, at no cost: the sum itself is made without it.
    """
    result, spare = torch.add(square, error, alpha=c[-2] / c[-1], out=room), torch.empty_like(room)
    result.diagonal().add_(c[-3] / c[-1])
    for i in range(len(c) - 5, -1, -2):  # times E², and ... + c[i] I + c[i + 1] E
        result, spare = _symmetric_product(square, result, spare), result
        result.add_(error, alpha=c[i + 1] / c[-1]).diagonal().add_(c[i] / c[-1])
    return torch.addmm(matrix, result, matrix, beta=0.0, alpha=c[-1])


def _symmetric_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``A B``, known to be symmetric, into ``out``: one half is multiplied, in strips, and mirrored."""
    rows = len(left)
    if rows < 2 * _STRIP:
        return torch.mm(left, right, out=out)
    for start in range(0, rows, _STRIP):
        stop = min(start + _STRIP, rows)
        torch.mm(left[start:stop], right[:, :stop], out=out[start:stop, :stop])
        if start:
            out[:start, start:stop].copy_(out[start:stop, :start].mT)
    return out


@lru_cache(maxsize=32)
def _probe(rows: int, dtype: torch.dtype) -> Tensor:
    """A fixed vector of entries of variance one without structure."""
    phases = torch.arange(1, rows + 1, dtype=torch.float64, device="cpu")
    return (2**0.5 * torch.sin(phases.square())).to(dtype)


def _largest(square: Tensor, size: float) -> float:
    """The largest eigenvalue of ``E²``, from below; ``size`` is ``‖E‖_F``, which keeps the powers in range."""
    scale = 1 / max(size * size, torch.finfo(square.dtype).tiny)
    x = _probe(len(square), square.dtype)
    for _ in range(_POWERS):
        x = torch.addmv(x, square, x, beta=0.0, alpha=scale)
    length = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(torch.mv(square, x))) / length if length > 0 else 0.0
