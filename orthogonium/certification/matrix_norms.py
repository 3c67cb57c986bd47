"""Distances between the rows of a matrix, from above, with the rounding of their own computation included."""

import torch
from torch import Tensor

from orthogonium.linalg._rounding import gamma


def _row_distances_upper_bound(matrix: Tensor) -> Tensor:
    """Never below ``‖w_i − w_j‖``, for all pairs of rows of ``(m, n)``: ``(m, m)``, float64."""
    exact = matrix.detach().to(device="cpu", dtype=torch.float64)
    slack = 1 + 4 * gamma(matrix.shape[1] + 4)
    rows = []
    for row in exact:
        difference = exact - row
        distance = torch.linalg.vector_norm(difference, dim=-1) + 2.0**-500  # squares below it may underflow
        rows.append(torch.where(difference.eq(0).all(-1), 0.0, distance * slack))
    return torch.stack(rows)
