"""Products that write into one fresh tensor: for large matrices a temporary costs as much as the arithmetic on it."""

import torch
from torch import Tensor


def add_product(addend: Tensor, left: Tensor, right: Tensor, scale: float, addend_scale: float = 1.0) -> Tensor:
    """``addend_scale · C + scale · A B``, batched."""
    if addend.ndim == 2:
        return torch.addmm(addend, left, right, beta=addend_scale, alpha=scale)
    return torch.matmul(left, right).mul_(scale).add_(addend, alpha=addend_scale)


def newton_schulz(matrix: Tensor) -> Tensor:
    """``1.5 Q − 0.5 (Q Qᵀ) Q``: squares the distance of a nearly orthogonal wide matrix from orthogonal."""
    return add_product(matrix, matrix @ matrix.mT, matrix, scale=-0.5, addend_scale=1.5)
