"""How far a matrix is from orthogonal, and how well conditioned it is."""

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._precision import raise_if_not_finite


def orthogonality_defect(matrix: Tensor) -> Tensor:
    """``‖I − Q Qᵀ‖₂`` on the shorter side, computed in float64.

    Zero exactly when ``matrix`` has orthonormal rows or columns, whichever are fewer.

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        ``(...)``, float64: the spectral norm of the difference; infinite where ``matrix`` holds NaN or Inf or entries
        whose squares overflow, zero for an empty matrix.

    Raises:
        ValueError: ``matrix`` has fewer than two dimensions.
        TypeError: not real floating point.
    """
    check_matrix("matrix", matrix)
    check_floating("matrix", matrix)
    short = matrix.double() if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT.double()
    gram = short @ short.mT
    if gram.numel() == 0:
        return gram.sum((-2, -1))
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    finite = gram.isfinite().all(-1).all(-1)
    difference = torch.where(finite[..., None, None], gram - identity, 0.0)
    return torch.where(finite, torch.linalg.eigvalsh(difference).abs().amax(-1), torch.inf)


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of ``(..., m, n)``, descending, in float64: ``(..., min(m, n))``.

    Raises:
        ValueError: fewer than two dimensions, or NaN or Inf.
        TypeError: not real floating point.
    """
    check_matrix("matrix", matrix)
    check_floating("matrix", matrix)
    raise_if_not_finite("matrix", matrix)
    return torch.linalg.svdvals(matrix.double())


def condition_number(matrix: Tensor) -> Tensor:
    """Largest singular value over the smallest, ``(...)``; infinite for a singular matrix, one for an empty one."""
    values = singular_values(matrix)
    if values.shape[-1] == 0:
        return values.new_ones(values.shape[:-1])
    most, least = values[..., 0], values[..., -1]
    return torch.where(least > 0, most / least, torch.inf)


def stable_rank(matrix: Tensor) -> Tensor:
    """``‖A‖_F² / ‖A‖₂²``, ``(...)``: between 1 and the rank, and never jumps.

    Source: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007.
    """
    values = singular_values(matrix)
    scaled = values / values[..., :1].clamp_min(torch.finfo(values.dtype).tiny)
    return scaled.square().sum(-1)
