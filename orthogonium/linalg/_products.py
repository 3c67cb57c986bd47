"""Products that know their result: symmetric ones spare half of the work, others write into one fresh tensor.

For large matrices a temporary, or one read against its layout, costs as much as the arithmetic on it.
"""

import torch
from torch import Tensor

from orthogonium.linalg._constants import identity
from orthogonium.linalg._precision import is_vectorized

# Symmetric products are made in strips of this many rows; below two strips a call costs more than it saves.
_STRIP = 128

# From this side on a skew part is faster of a matrix with gaps, of a cache line, between its rows.
_ROOMY, _GAP = 128, 16

# Up to this side a second product is cheaper than adding a matrix to its transpose.
_TWICE = 64


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``A B`` of as many dimensions each: past the broadcasting of ``matmul``, which costs 5 µs with a batch."""
    if left.ndim == 2:
        return torch.mm(left, right, out=out)
    return torch.bmm(left, right, out=out) if left.ndim == 3 else torch.matmul(left, right, out=out)


def add_product(addend: Tensor, left: Tensor, right: Tensor, scale: float, addend_scale: float = 1.0) -> Tensor:
    """``addend_scale · C + scale · A B``, batched."""
    if addend.ndim == 2:
        return torch.addmm(addend, left, right, beta=addend_scale, alpha=scale)
    if addend.ndim == 3:
        return torch.baddbmm(addend, left, right, beta=addend_scale, alpha=scale)
    return product(left, right).mul_(scale).add_(addend, alpha=addend_scale)


def add_product_(addend: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``C + scale · A B`` in the place of ``C``, of which a product out of place first makes a copy."""
    if addend.ndim == 2:
        return addend.addmm_(left, right, alpha=scale)
    if addend.ndim == 3:
        return addend.baddbmm_(left, right, alpha=scale)
    return addend.add_(product(left, right), alpha=scale)


def _worth_strips(left: Tensor) -> bool:
    return left.ndim == 2 and left.shape[0] >= 2 * _STRIP and not left.is_cuda


def lower_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangle of ``A B``, ``(..., m, m)``; above it, finite but arbitrary. Not differentiable."""
    if not _worth_strips(left):
        return product(left, right, out)
    result = left.new_empty(len(left), len(left)) if out is None else out
    for start in range(0, len(left), _STRIP):
        stop = min(start + _STRIP, len(left))
        torch.mm(left[start:stop], right[:, :stop], out=result[start:stop, :stop])
        result[start:stop, stop:].zero_()
    return result


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``A B``, known to be symmetric: only the lower half is multiplied. Not differentiable."""
    if not _worth_strips(left):
        return product(left, right)
    result = torch.empty(len(left), len(left), dtype=left.dtype, device=left.device)
    for start in range(0, len(left), _STRIP):
        stop = min(start + _STRIP, len(left))
        torch.mm(left[start:stop], right[:, :stop], out=result[start:stop, :stop])
        result[:start, start:stop].copy_(result[start:stop, :start].mT)
    return result


def upper_times(upper: Tensor, right: Tensor) -> Tensor:
    """``U B`` with ``U`` upper triangular, ``(..., m, m)``: strips skip what is zero. Not differentiable."""
    if not _worth_strips(upper):
        return product(upper, right)
    result = torch.empty_like(right, memory_format=torch.contiguous_format)
    for start in range(0, len(upper), _STRIP):
        stop = start + _STRIP
        torch.mm(upper[start:stop, start:], right[start:], out=result[start:stop])
    return result


def gram_error(matrix: Tensor) -> Tensor:
    """``Q Qᵀ − I``, ``(..., m, m)``. Not differentiable."""
    if matrix.ndim > 3 or _worth_strips(matrix):
        error = symmetric_product(matrix, matrix.mT)
        error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return error
    addend = identity(matrix.shape[-2], matrix)
    if matrix.ndim == 2:
        return torch.addmm(addend, matrix, matrix.mT, beta=-1)
    return torch.baddbmm(addend, matrix, matrix.mT, beta=-1)


def lower_gram_error(matrix: Tensor) -> Tensor:
    """The lower triangle of ``Q Qᵀ − I``, ``(..., m, m)``; above it, finite but arbitrary. Not differentiable."""
    if not _worth_strips(matrix):
        return gram_error(matrix)
    error = lower_product(matrix, matrix.mT)
    error.diagonal().sub_(1.0)
    return error


def roomy_product(left: Tensor, right: Tensor) -> Tensor:
    """``A B``, ``(..., m, m)``, with gaps between its rows where that helps :func:`skew_part`.

    A column of a row-major matrix whose side is a power of two falls into few sets of the cache; a gap spreads it.
    """
    return product(left, right, _room(left, right))


def add_roomy_product(addend: Tensor, left: Tensor, right: Tensor, scale: float, addend_scale: float = 1.0) -> Tensor:
    """:func:`add_product`, likewise."""
    room = _room(left, right)
    if room is None:
        return add_product(addend, left, right, scale, addend_scale)
    add = torch.addmm if addend.ndim == 2 else torch.baddbmm
    return add(addend, left, right, beta=addend_scale, alpha=scale, out=room)


def _room(left: Tensor, right: Tensor) -> Tensor | None:
    rows = left.shape[-2]
    wanted = rows >= _ROOMY and left.ndim == right.ndim <= 3 and not left.is_cuda
    if not wanted or is_vectorized(left) or is_vectorized(right):
        return None
    return left.new_empty((*left.shape[:-1], rows + _GAP))[..., :rows]


def skew_part(matrix: Tensor) -> Tensor:
    """``A − Aᵀ``. Without gaps (:func:`roomy_product`) a large one is copied first, which torch does by blocks."""
    if matrix.shape[-1] <= _STRIP or matrix.stride(-2) != matrix.shape[-1]:
        return matrix - matrix.mT
    flipped = matrix.mT.clone(memory_format=torch.contiguous_format)
    return flipped.neg_().add_(matrix)


def commutator(symmetric: Tensor, skew: Tensor) -> Tensor:
    """``H C − C H`` of symmetric ``H`` and skew ``C``: symmetric."""
    first = product(symmetric, skew)
    if symmetric.shape[-1] <= _TWICE:
        return add_product_(first, skew, symmetric, scale=-1.0)
    return first + first.mT


def add_anticommutator(
    addend: Tensor, symmetric: Tensor, other: Tensor, scale: float, addend_scale: float, skew: bool
) -> Tensor:
    """``addend_scale · C + scale · (H B + B H)`` of symmetric ``H`` and ``B``, ``C`` symmetric or ``skew`` both."""
    if symmetric.shape[-1] <= _TWICE:
        first = add_product(addend, symmetric, other, scale, addend_scale)
        return add_product_(first, other, symmetric, scale)
    half = add_roomy_product(addend, symmetric, other, scale, 0.5 * addend_scale)
    return skew_part(half) if skew else half + half.mT


def newton_schulz(matrix: Tensor) -> Tensor:
    """``1.5 Q − 0.5 (Q Qᵀ) Q``: squares the distance of a nearly orthogonal wide matrix from orthogonal."""
    return add_product(matrix, symmetric_product(matrix, matrix.mT), matrix, scale=-0.5, addend_scale=1.5)
