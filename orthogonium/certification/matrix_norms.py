"""Norms of one matrix, from above, with the rounding of their own computation included."""

import math

import torch
from torch import Tensor

_ROUNDOFF = 2.0**-53  # of float64, to nearest
_UP = 1 + 2.0**-50  # covers a handful of float64 roundings


def gamma(terms: int, roundoff: float = _ROUNDOFF) -> float:
    """``k·u / (1 − k·u)``: relative to ``|A||B|``, the most that a sum of ``terms`` products can be off.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM 2002, section 3.1.
    """
    return terms * roundoff / (1 - terms * roundoff) * _UP


def _frobenius_upper_bound(matrix: Tensor) -> float:
    """Never below ``‖A‖_F`` of a float64 ``matrix`` whose largest entry is about one."""
    return math.sqrt(float(matrix.square().sum()) * (1 + 2 * gamma(matrix.numel() + 2))) * _UP


def _norm_upper_bound(matrix: Tensor) -> float:
    """Never below ``‖A‖₂`` of ``matrix``, and within about 1e-8 of it relatively.

    With ``G = A Aᵀ`` on the shorter side n, a number ``c`` is a bound on ``‖A‖₂²`` once ``c I − G`` is
    shown positive semidefinite. The largest eigenvalue as ``eigvalsh`` reports it is only a hint for
    ``c``; the proof is a Cholesky factor L of ``B = c I − G``, whose residual is computed rather than
    trusted. Since ``L Lᵀ ⪰ 0``, Weyl's inequality gives

        ``‖A‖₂² ≤ c + ‖B − L Lᵀ‖_F + rounding of G, of B and of the residual``.

    The matrix is scaled by a power of two first, which is exact, so that nothing overflows, and what
    underflows is covered by one absolute term. When no factor exists for any tried ``c``, the Frobenius
    norm is the bound.

    Args:
        matrix: ``(m, n)``, of any floating-point type; float64 holds every narrower type exactly.

    Raises:
        ValueError: ``matrix`` has an entry that is not finite.

    Source:
        Rump, "Verification methods: rigorous results using floating-point arithmetic", Acta Numerica 19,
        2010, for the method; Higham (2002), sections 3.5 and 10.1, for the rounding of products.
    """
    exact = matrix.detach().to(device="cpu", dtype=torch.float64)
    if not torch.isfinite(exact).all():
        raise ValueError("the matrix holds NaN or infinite entries, so it has no norm to bound")
    if exact.numel() == 0 or not exact.any():
        return 0.0
    exponent = math.frexp(float(exact.abs().max()))[1]
    half = exponent // 2  # in two steps: 2⁻ᵉ alone may overflow
    exact = exact * 2.0**-half * 2.0 ** (half - exponent)
    short = exact if exact.shape[0] <= exact.shape[1] else exact.mT
    squared = _squared_norm_upper_bound(short)
    bound = min(math.sqrt(squared) * _UP, _frobenius_upper_bound(short))
    try:
        return math.nextafter(math.ldexp(bound, exponent), math.inf)
    except OverflowError:
        return math.inf


def _squared_norm_upper_bound(short: Tensor) -> float:
    """A bound on the square of ``‖A‖₂`` for ``short`` of shape ``(n, k)``, n ≤ k, entries at most one."""
    n, k = short.shape
    gram = short @ short.mT
    frobenius = _frobenius_upper_bound(short)
    # |fl(A Aᵀ) − A Aᵀ| ≤ γ_k |A||A|ᵀ entrywise, whose Frobenius norm is at most γ_k ‖A‖_F². Products of
    # entries below 2⁻⁵⁰⁰ may underflow: n·k of them, each off by less than the smallest normal number.
    underflow = n * k * 2.0**-1022
    gram_error = 2 * gamma(k) * frobenius**2 + underflow
    gram_norm = _frobenius_upper_bound(gram)
    hint = float(torch.linalg.eigvalsh(gram)[-1])
    for slack in (1e-9, 1e-6, 1e-3):
        c = hint * (1 + slack) + 4 * n * gamma(n) * abs(hint)
        shifted = -gram
        shifted.diagonal().add_(c)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) or not torch.isfinite(factor).all():
            continue
        residual = _frobenius_upper_bound(shifted - factor @ factor.mT)
        factor_norm = _frobenius_upper_bound(factor)
        rounding = 2 * gamma(n + 2) * factor_norm**2 + 2 * _ROUNDOFF * (abs(c) * n + gram_norm) + underflow
        return (c + residual + rounding + gram_error) * _UP
    return frobenius**2 * _UP


def _absolute_norm_upper_bound(matrix: Tensor) -> float:
    """Never below ``‖ |A| ‖₂``, the norm of the matrix of absolute values: √(row sum · column sum)."""
    exact = matrix.detach().to(device="cpu", dtype=torch.float64).abs()
    if exact.numel() == 0:
        return 0.0
    slack = 1 + 2 * gamma(max(exact.shape))
    rows, columns = float(exact.sum(1).max()), float(exact.sum(0).max())
    return math.sqrt(rows * slack) * math.sqrt(columns * slack) * _UP


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
