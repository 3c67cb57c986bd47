"""Orthonormal bases of subspaces, for functions of the subspaces alone."""

import torch
from torch import Tensor

from orthogonium.linalg._gram_schmidt import _lq_backward, _lq_forward, solve_lower, solve_lower_transposed


def span_basis(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(Q, L, s)`` with ``frames = L Q`` to rounding where ``s``, on the CPU, is false, and ``Q`` orthonormal.

    A Cholesky factor, checked: the error ``E = Q Qᵀ − I`` that it leaves is corrected to first order within the span.
    Where it is too large, the general factorisation takes over.

    Args:
        frames: ``(b, r, c)``, ``r ≤ c``: the rows span the subspaces.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if frames.is_meta:
        return _lq_forward(frames, "cholesky")
    lower = torch.linalg.cholesky_ex(torch.bmm(frames, frames.mT)).L
    q = solve_lower(lower, frames)
    error = torch.bmm(q, q.mT)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    if torch.linalg.vector_norm(error).item() <= torch.finfo(frames.dtype).eps ** 0.5:
        return torch.baddbmm(q, error, q, alpha=-0.5), lower, torch.tensor(False)
    return _lq_forward(frames, "cholesky")


def span_backward(grad: Tensor, q: Tensor, lower: Tensor, special: Tensor) -> Tensor:
    """The gradient of the frames, given that of ``Q`` of a function of ``Qᵀ Q``.

    ``G Qᵀ`` is symmetric for such a function, and nothing is left of ``G`` along the span: ``L⁻ᵀ (G − G Qᵀ Q)``.
    """
    if special.item():
        return _lq_backward(grad, q, lower, special)
    along = torch.bmm(grad, q.mT)
    return solve_lower_transposed(lower, torch.baddbmm(grad, along, q, alpha=-1))
