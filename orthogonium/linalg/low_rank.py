"""Two thin factors for a matrix that is nearly of low rank, in one or a few passes over it."""

from typing import Literal

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix

Sampling = Literal["subspace", "columns"]


def low_rank_factors(
    matrix: Tensor,
    rank: int,
    method: Sampling = "subspace",
    *,
    start: Tensor | None = None,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``(a, b)`` with ``a bᵀ ≈ matrix``: ``a`` has orthonormal columns and ``a bᵀ = a aᵀ matrix`` is a projection.

    - ``"subspace"``: ``steps`` rounds of subspace iteration, which tends to the best approximation of that rank. A
      ``start`` from a similar matrix (the ``b`` of the last step of training) is worth several rounds.
    - ``"columns"``: the span of ``rank`` columns, drawn with probabilities proportional to their squared norms. Cheaper
      (the matrix is read once), and unlike a fixed subspace it sees every direction in turn.

    Args:
        matrix: ``(..., m, n)``.
        rank: ``k``, at least 1; more than ``min(m, n)`` is cut to that.
        method: how the column space is found.
        start: ``(..., n, k)`` to start subspace iteration from; Gaussian by default.
        steps: rounds of subspace iteration, at least 1; two products of ``m n k`` each.
        generator: for reproducible draws.

    Returns:
        ``a``: ``(..., m, k)`` and ``b``: ``(..., n, k)``.

    Raises:
        ValueError: a rank or number of steps below 1, an unknown method, a start of another shape.
        TypeError: not real floating point.

    Source:
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011; the sampling of
        columns by norms is Frieze, Kannan and Vempala, J. ACM 51(6), 2004.
    """
    check_matrix("matrix", matrix)
    check_floating("matrix", matrix)
    if rank < 1 or steps < 1:
        raise ValueError(f"rank and steps must be at least 1, got rank={rank}, steps={steps}")
    if method not in ("subspace", "columns"):
        raise ValueError(f"method must be 'subspace' or 'columns', got {method!r}")
    *batch, m, n = matrix.shape
    rank = min(rank, m, n)
    work = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    if method == "columns":
        columns = _sampled(work, rank, generator)
    else:
        if start is None:
            start = torch.randn(*batch, n, rank, generator=generator, dtype=work.dtype, device=work.device)
        elif tuple(start.shape) != (*batch, n, rank):
            raise ValueError(f"start must have shape {(*batch, n, rank)}, got {tuple(start.shape)}")
        columns = work @ _unit_columns(start.to(work.dtype))
    for _ in range(steps - 1 if method == "subspace" else 0):
        columns = work @ torch.linalg.qr(work.mT @ torch.linalg.qr(columns).Q).Q
    left = torch.linalg.qr(columns).Q
    return left.to(matrix.dtype), (work.mT @ left).to(matrix.dtype)


def _unit_columns(start: Tensor) -> Tensor:
    """Columns of norm one, so that the product keeps the scale of the matrix; a zero column stays zero."""
    norms = torch.linalg.vector_norm(start, dim=-2, keepdim=True)
    return start / torch.where(norms > 0, norms, 1.0)


def _sampled(matrix: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """Distinct columns, drawn by squared norm (Gumbel's trick: the ``rank`` largest of log-weight plus noise)."""
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(largest > 0, largest, 1.0)
    weights = scaled.square().sum(-2).log()  # −inf for a zero column: drawn last
    noise = torch.rand(weights.shape, generator=generator, dtype=weights.dtype, device=weights.device)
    drawn = (weights - (-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()).topk(rank, -1).indices
    return matrix.gather(-1, drawn[..., None, :].expand(*matrix.shape[:-1], rank))
