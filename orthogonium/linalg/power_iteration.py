"""The largest singular value, from below."""

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix


def power_iteration(matrix: Tensor, left: Tensor, steps: int, eps: float = 1e-12) -> tuple[Tensor, Tensor, Tensor]:
    """An estimate of ``‖A‖₂`` that errs low, and the singular vectors found.

    Each step is ``v = Aᵀ u / ‖Aᵀ u‖``, ``u = A v / ‖A v‖``; the estimate is ``uᵀ A v``. Starting from the vectors of
    the step before, few steps follow a slowly changing matrix. The estimate's derivative is the exact ``u vᵀ`` of a
    simple largest singular value, with ``u`` and ``v`` held fixed. To certify, use an upper bound.

    Args:
        matrix: ``(..., m, n)``.
        left: ``(..., m)``, where to start; need not be normalised.
        steps: at least 1.
        eps: a vector shorter than this share of the largest entry has been lost, and the iteration starts anew from the
            row sums of ``|A|``, so that a zero matrix leaves no trace behind.

    Returns:
        ``(sigma, u, v)`` of shapes ``(...)``, ``(..., m)``, ``(..., n)``.

    Raises:
        ValueError: fewer than two dimensions.
        TypeError: not real floating point.

    Source:
        Golub and Van Loan, *Matrix Computations*, 4th ed., section 8.2; Miyato et al., ICLR 2018.
    """
    check_matrix("matrix", matrix)
    check_floating("matrix", matrix)
    with torch.no_grad():
        a = matrix.detach()
        largest = a.abs().amax((-2, -1), keepdim=True)
        a = a / torch.where(largest > 0, largest, 1.0)  # 1e±30 squared would leave float32
        restart = _normalized(a.abs().sum(-1), eps)
        usable = torch.isfinite(left).all(-1, keepdim=True) & (left != 0).any(-1, keepdim=True)
        u = torch.where(usable, left / left.abs().amax(-1, keepdim=True), restart)
        for _ in range(steps):
            v = _normalized((a.mT @ u[..., None])[..., 0], eps)
            lost = (v == 0).all(-1, keepdim=True)  # u was orthogonal to the range of A
            v = torch.where(lost, _normalized((a.mT @ restart[..., None])[..., 0], eps), v)
            u = _normalized((a @ v[..., None])[..., 0], eps)
    return (u[..., None, :] @ matrix @ v[..., None])[..., 0, 0], u, v


def _normalized(vector: Tensor, eps: float) -> Tensor:
    """``x / ‖x‖``, and zero where ``‖x‖ ≤ eps``."""
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(norm > eps, vector / norm.clamp_min(eps), 0.0)
