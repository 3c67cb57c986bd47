"""The direction of the polar factor, for orthogonalised momentum."""

import torch
from torch import Tensor

from orthogonium.linalg._polar_by_products import minimax_steps
from orthogonium.linalg._precision import in_working_precision, scaled_to_one
from orthogonium.linalg.minimax import polar_schedule


@in_working_precision
def soft_polar(matrix: Tensor, lowest: float = 1e-3) -> Tensor:
    """The polar factor of the large singular values, by a fixed number of products: zero stays zero.

    What orthogonalised momentum asks for: a direction, not a point. Singular values of at least ``lowest · ‖W‖_F``
    become one to within 1 %, smaller ones grow in proportion, none exceeds 1.01, and nothing waits for the device.

    Args:
        matrix: ``(..., m, n)``. Not to be differentiated through; use :func:`polar` for that.
        lowest: in ``(0, 1)``. 1e-3 takes six steps of three products each.

    Returns:
        ``(..., m, n)``.

    Raises:
        ValueError: fewer than two dimensions, or ``lowest`` outside ``(0, 1)``.
        TypeError: not real floating point.

    Source: Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932.
    """
    if not 0 < lowest < 1:
        raise ValueError(f"lowest must be in (0, 1), got {lowest}")
    if matrix.shape[-2] > matrix.shape[-1]:
        return soft_polar(matrix.mT, lowest).mT
    scaled, _ = scaled_to_one(matrix)
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    return minimax_steps(scaled / torch.where(norm > 0, norm, 1.0), polar_schedule(lowest, 1e-2))
