"""Projectors onto the spans of some frames, and the way back from them to the frames."""

from typing import NamedTuple

import torch
from torch import Tensor

from orthogonium.linalg._gram_schmidt import _lq_backward, _lq_forward, solve_lower_transposed
from orthogonium.linalg._products import gram_error


class Spans(NamedTuple):
    """Of the rows of frames ``F``, ``(b, r, c)``.

    Attributes:
        projectors: ``(b, c, c)``, ``P = Fᵀ (F Fᵀ)⁻¹ F``.
        basis: ``(b, r, c)``: ``(F Fᵀ)⁻¹ F`` where ``F`` was orthonormal but for a small error, else the orthonormal
            ``Q`` of ``F = L Q``.
        lower: ``(b, r, r)``, that ``L``, if it was needed.
        special: on the CPU, with ``lower``; whether ``L`` may be singular or of extreme scale.
    """

    projectors: Tensor
    basis: Tensor
    lower: Tensor | None = None
    special: Tensor | None = None


def spans_of(frames: Tensor) -> Spans:
    """By ``(I + E)⁻¹ F = F − E F + E² F − …`` where ``E = F Fᵀ − I`` is small, else by Cholesky.

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
        if size <= eps ** (1 / 3):  # the series goes on with E³
            if size > eps**0.5:
                error = torch.baddbmm(error, error, error, alpha=-1)
            basis = torch.baddbmm(frames, error, frames, alpha=-1)
            return Spans(torch.bmm(frames.mT, basis), basis)
    q, lower, special = _lq_forward(frames, "cholesky")
    return Spans(torch.bmm(q.mT, q), q, lower, special)


def spans_backward(grad: Tensor, spans: Spans) -> Tensor:
    """The gradient of the frames, given that of the projectors, ``(b, c, c)``, symmetric or not.

    It is ``(F Fᵀ)⁻¹ F (G + Gᵀ) (I − P)``: nothing along the spans.
    """
    projectors, basis, lower, special = spans
    found = torch.bmm(basis, grad + grad.mT)
    found = torch.baddbmm(found, found, projectors, alpha=-1)
    if lower is None or special is None:
        return found
    return _lq_backward(found, basis, lower, special) if special.item() else solve_lower_transposed(lower, found)
