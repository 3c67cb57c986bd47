"""Products that know their result: symmetric ones spare half of the work, others write into one fresh tensor.

For large matrices a temporary, or one read against its layout, costs as much as the arithmetic on it.
"""

import torch
from torch import Tensor

# Symmetric products are made in strips of this many rows; below two strips a call costs more than it saves.
_STRIP = 128


def add_product(addend: Tensor, left: Tensor, right: Tensor, scale: float, addend_scale: float = 1.0) -> Tensor:
    """``addend_scale · C + scale · A B``, batched."""
    if addend.ndim == 2:
        return torch.addmm(addend, left, right, beta=addend_scale, alpha=scale)
    if addend.ndim == 3:
        return torch.baddbmm(addend, left, right, beta=addend_scale, alpha=scale)
    return torch.matmul(left, right).mul_(scale).add_(addend, alpha=addend_scale)


def _worth_strips(left: Tensor) -> bool:
    return left.ndim == 2 and left.shape[0] >= 2 * _STRIP and not left.is_cuda


def lower_product(left: Tensor, right: Tensor) -> Tensor:
    """The lower triangle of ``A B``, ``(..., m, m)``; above it, finite but arbitrary. Not differentiable."""
    if not _worth_strips(left):
        return left @ right
    result = torch.zeros(len(left), len(left), dtype=left.dtype, device=left.device)
    for start in range(0, len(left), _STRIP):
        stop = min(start + _STRIP, len(left))
        torch.mm(left[start:stop], right[:, :stop], out=result[start:stop, :stop])
    return result


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``A B``, known to be symmetric: only the lower half is multiplied. Not differentiable."""
    if not _worth_strips(left):
        return left @ right
    result = torch.empty(len(left), len(left), dtype=left.dtype, device=left.device)
    for start in range(0, len(left), _STRIP):
        stop = min(start + _STRIP, len(left))
        torch.mm(left[start:stop], right[:, :stop], out=result[start:stop, :stop])
        result[:start, start:stop].copy_(result[start:stop, :start].mT)
    return result


def gram_error(matrix: Tensor) -> Tensor:
    """``Q Qᵀ − I``, ``(..., m, m)``. Not differentiable."""
    if matrix.ndim > 3 or _worth_strips(matrix):
        error = symmetric_product(matrix, matrix.mT)
        error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        return error
    identity = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
    if matrix.ndim == 2:
        return torch.addmm(identity, matrix, matrix.mT, beta=-1)
    return torch.baddbmm(identity, matrix, matrix.mT, beta=-1)


def skew_part(matrix: Tensor) -> Tensor:
    """``A − Aᵀ``. A copy in the other layout is made by blocks: faster than arithmetic across layouts, if large."""
    if matrix.shape[-1] <= _STRIP:
        return matrix - matrix.mT
    flipped = matrix.mT.clone(memory_format=torch.contiguous_format)
    return flipped.neg_().add_(matrix)


def newton_schulz(matrix: Tensor) -> Tensor:
    """``1.5 Q − 0.5 (Q Qᵀ) Q``: squares the distance of a nearly orthogonal wide matrix from orthogonal."""
    return add_product(matrix, symmetric_product(matrix, matrix.mT), matrix, scale=-0.5, addend_scale=1.5)
