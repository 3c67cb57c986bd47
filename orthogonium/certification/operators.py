"""Norms of the linear maps that rules meet, as numbers rounded up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.certification.operator_norm import absolute_norm_bound, operator_norm_bound
from orthogonium.certification.rounding import times_up
from orthogonium.linalg import absolute_kernel_norm_bound, kernel_norm_bound, spectral_norm_bound
from orthogonium.linalg._rounding import gamma


def matrix_norms(matrix: Tensor) -> tuple[float, float]:
    """Never below the largest singular value of ``(m, n)``, and of the matrix of absolute values."""
    exact = matrix.detach()
    return float(spectral_norm_bound(exact)), float(spectral_norm_bound(exact.abs()))


def vector_norm(vector: Tensor) -> float:
    """Never below ``‖v‖₂`` of a tensor of any shape."""
    return float(spectral_norm_bound(vector.detach().reshape(1, -1)))


def kernel_norms(kernel: Tensor, **geometry: Any) -> tuple[float, float]:
    """Bounds on the norms of a convolution and of that with ``|K|``."""
    return kernel_norm_bound(kernel, **geometry), absolute_kernel_norm_bound(kernel, **geometry)


def module_norms(module: nn.Module, shape: Sequence[int] | None) -> tuple[float, float]:
    """Bounds on ``‖W‖₂`` and ``‖ |W| ‖₂`` of a linear or convolution layer, for one input of ``shape`` if given."""
    return operator_norm_bound(module, shape), absolute_norm_bound(module, shape)


def materialised_norm(matrices: Sequence[Tensor]) -> float:
    """The norm of a Kronecker product of small matrices, one per axis."""
    total = 1.0
    for matrix in matrices:
        if not (matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))):
            total = times_up(total, float(spectral_norm_bound(matrix)))
    return total


def row_distances(matrix: Tensor) -> Tensor:
    """Never below ``‖w_i − w_j‖``, for all pairs of rows of ``(m, n)``: ``(m, m)``, float64."""
    exact = matrix.detach().to(device="cpu", dtype=torch.float64)
    slack = 1 + 4 * gamma(matrix.shape[1] + 4)
    rows = []
    for row in exact:
        difference = exact - row
        distance = torch.linalg.vector_norm(difference, dim=-1) + 2.0**-500  # squares below it may underflow
        rows.append(torch.where(difference.eq(0).all(-1), 0.0, distance * slack))
    return torch.stack(rows)
