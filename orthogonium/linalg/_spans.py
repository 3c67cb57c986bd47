"""Orthonormal bases of subspaces, for functions of the subspaces alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from orthogonium.linalg._gram_schmidt import _lq_backward, _lq_forward, solve_lower_transposed
from orthogonium.linalg._products import gram_error


class Basis(NamedTuple):
    """Orthonormal rows ``q`` that span what the rows of some frames ``F`` do.

    Attributes:
        q: ``(b, r, c)``.
        factor: ``(b, r, r)``: ``H`` with ``Q = F + H F`` (see ``near``), or ``L`` with ``F = L Q``.
        special: on the CPU; whether ``L`` may be singular or of extreme scale.
        near: whether ``F`` was orthonormal but for a small error.
    """

    q: Tensor
    factor: Tensor
    special: Tensor
    near: bool


_ORDINARY = torch.tensor(False)


def span_basis(frames: Tensor) -> Basis:
    """By ``(I + E)^(−½) F = (I − E/2 + 3 E²/8 − …) F`` where ``E = F Fᵀ − I`` is small, else by Cholesky.

    Frames are drawn orthonormal, and the gradient of a function of their spans is perpendicular to the spans, so that
    a step changes ``F Fᵀ`` to second order only: training stays near for long.

    Args:
        frames: ``(b, r, c)``, ``r ≤ c``.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if not frames.is_meta:
        error = gram_error(frames)
        size, eps = torch.linalg.vector_norm(error).item(), torch.finfo(frames.dtype).eps
        if size <= (2 * eps) ** (1 / 3):  # the series goes on with 5 E³/16
            short = size <= eps**0.5
            factor = error.mul_(-0.5) if short else torch.baddbmm(error, error, error, beta=-0.5, alpha=0.375)
            return Basis(torch.baddbmm(frames, factor, frames), factor, _ORDINARY, True)
    q, lower, special = _lq_forward(frames, "cholesky")
    return Basis(q, lower, special, False)


def span_backward(grad: Tensor, basis: Basis) -> Tensor:
    """The gradient of the frames, given the part across the span of that of ``Q``, of a function of ``Qᵀ Q``.

    For such a function nothing is left of the part along the span: the gradient is ``L⁻ᵀ G``, or the same with ``I + H``
    in place of ``L⁻ᵀ``.
    """
    q, factor, special, near = basis
    if not near and special.item():
        return _lq_backward(grad, q, factor, special)
    return torch.baddbmm(grad, factor, grad) if near else solve_lower_transposed(factor, grad)
