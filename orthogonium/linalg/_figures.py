"""One figure per matrix, and what is read back of them; for a single matrix, where calls count, with fewer of those."""

import torch
from torch import Tensor


def largest(values: Tensor) -> float:
    """The largest of one figure per matrix, read back; for a single matrix without a reduction."""
    return float(values.item() if values.ndim == 0 else values.amax().item())


def smallest(values: Tensor) -> float:
    """The smallest, likewise."""
    return float(values.item() if values.ndim == 0 else values.amin().item())


def extremes(values: Tensor) -> tuple[float, float]:
    """Both, likewise."""
    if values.ndim == 0:
        value = float(values.item())
        return value, value
    return smallest(values), largest(values)


def frobenius(matrix: Tensor) -> Tensor:
    """``‖A‖_F``, ``(...)``."""
    if matrix.ndim == 2:  # over everything, which torch does in one run through memory
        return torch.linalg.vector_norm(matrix)
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def trace(matrix: Tensor) -> Tensor:
    """``tr A``, ``(...)``."""
    return torch.trace(matrix) if matrix.ndim == 2 else matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def least_ratio(ascending: Tensor) -> float:
    """The least of first over last among rows ``(..., n)`` in ascending order, read back; NaN where NaN is."""
    if ascending.ndim == 1:
        first, last = ascending[0].item(), ascending[-1].item()
        return first / last if last else float("nan")
    return smallest(ascending[..., 0] / ascending[..., -1])
