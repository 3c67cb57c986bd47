"""The largest eigenvalue of a symmetric or Hermitian matrix, from above, from a factorisation that is checked.

A Hermitian matrix is held as its real and its imaginary part, so that real products are all that has to be trusted.
"""

import math

import torch
from torch import Tensor

from orthogonium.linalg._rounding import ROUNDOFF, TINY, UP, frobenius_bound, gamma

_SLACKS = (1e-9, 1e-6, 1e-3)
_LEVEL_SLACK = 3e-5  # what a float32 factor leaves room for
_ROUNDS = 6
_CACHED_ENTRIES = 2**16  # of a batch that is worked on at once


def trace_bound(real: Tensor, imag: Tensor | None, error: Tensor) -> Tensor:
    """``λ_max ≤ tr/n + √((n − 1)/n) ‖H − (tr/n) I‖_F``: exact for multiples of the identity and for rank one.

    Args:
        real, imag: ``(..., n, n)``, the computed matrix; ``imag`` may be ``None``.
        error: ``(...)``, at least its distance from the Hermitian matrix in question, in Frobenius norm.

    Returns:
        ``(...)``, never below the largest eigenvalue of the latter.

    Source: Wolkowicz and Styan, "Bounds for eigenvalues using traces", Linear Algebra Appl. 29, 1980. The mean
    eigenvalue is not known exactly; for any other number μ near it, what is left of the trace is added.
    """
    n = real.shape[-1]
    middle = real.diagonal(dim1=-2, dim2=-1).mean(-1)
    rest = real.clone()
    diagonal = rest.diagonal(dim1=-2, dim2=-1)
    diagonal -= middle.unsqueeze(-1)
    sizes = diagonal.abs().sum(-1)
    trace = diagonal.sum(-1).abs() + 4 * gamma(n + 2) * sizes
    total = frobenius_bound(rest) if imag is None else frobenius_bound(rest, imag)
    spread = math.sqrt((n - 1) / n) * UP * total
    return (middle.abs() * 4 * ROUNDOFF + middle + trace / n + spread + 3 * error) * UP


def largest_eigenvalue_bound(matrix: Tensor, error: Tensor) -> Tensor:
    """Never below ``λ_max``, and within about 1e-9 of it relative to ``λ_max``, for real symmetric matrices ``H ⪰ 0``.

    A number ``c`` is a bound once ``c I − H`` is shown positive semidefinite. What ``eigvalsh`` reports is only a hint
    for ``c``; the proof is a factor ``L`` of ``B = c I − H`` whose residual is computed rather than trusted: since
    ``L Lᵀ ⪰ 0``, Weyl's inequality gives ``λ_max ≤ c + ‖B − L Lᵀ‖_F + rounding``. Without a factor for any tried
    ``c``, :func:`trace_bound` stands.

    Args:
        matrix: ``(batch, n, n)``, the computed matrices, float64.
        error: ``(batch)``, at least their distance from ``H`` in Frobenius norm.

    Returns:
        ``(batch)``.

    Source:
        Rump, "Verification methods: rigorous results using floating-point arithmetic", Acta Numerica 19, 2010, for the
        method; Higham (2002), sections 3.5 and 10.1, for the rounding of products.
    """
    n = matrix.shape[-1]
    bound = trace_bound(matrix, None, error)
    try:
        hint = torch.linalg.eigvalsh(matrix)[..., -1].abs()
    except torch.linalg.LinAlgError:
        return bound
    left = torch.arange(len(matrix), device=matrix.device)
    for slack in _SLACKS:
        level = hint[left] * (1 + slack) + 4 * n * gamma(n) * hint[left]
        excess = _shift_excess(matrix[left], None, level, error[left])
        found = (level + excess) * UP
        bound[left] = torch.where(found < bound[left], found, bound[left])  # NaN, without a factor, is not below
        left = left[~torch.isfinite(found)]
        if not len(left):
            break
    return bound


def common_eigenvalue_bound(real: Tensor, imag: Tensor, error: Tensor, level: float = 0.0) -> tuple[float, float]:
    """One number that is below the largest eigenvalue of none of many Hermitian matrices ``H ⪰ 0``.

    The same proof as in :func:`largest_eigenvalue_bound` with one ``c`` for all: a few eigenvalues are computed, where
    factors fail, instead of all. The factors are computed in float32, the residuals in float64.

    Args:
        real, imag: ``(batch, n, n)``, float64.
        error: scalar, at least the distance of each from its ``H`` in Frobenius norm.
        level: the ``c`` to begin with, from a similar batch; 0 without one.

    Returns:
        The last ``c``, and the bound.
    """
    bound = 0.0
    errors = error.expand(len(real))
    if real.shape[-1] == 1:
        return level, float(trace_bound(real, None, errors).max())
    for attempt in range(_ROUNDS):
        if level > 0:
            levels = real.new_full((len(real),), level)
            excess = _shift_excess(real, imag, levels, errors[: len(real)], torch.float32)
            proved = torch.isfinite(excess)
            if bool(proved.any()):
                bound = max(bound, (level + float(excess[proved].max())) * UP)
            if bool(proved.all()):
                return level, bound
            real, imag = real[~proved], imag[~proved]
        hint = _largest_of_a_few(real, imag)
        level = max(hint * (1 + _LEVEL_SLACK), level * (1 + 4.0**attempt * _LEVEL_SLACK))
    return level, max(bound, float(trace_bound(real, imag, errors[: len(real)]).max()))


def _largest_of_a_few(real: Tensor, imag: Tensor, count: int = 6) -> float:
    """The largest eigenvalue of those matrices that four power steps find large; a hint, and no more than that."""
    if len(real) > 16 * count:
        heavy = real.square().sum((-2, -1)).topk(16 * count).indices
        real, imag = real[heavy], imag[heavy]
    if len(real) > count:
        vectors = torch.complex(real[:, :, :1], imag[:, :, :1])
        matrices = torch.complex(real.float(), imag.float()).to(torch.complex64)
        vectors = vectors.to(torch.complex64)
        for _ in range(4):
            vectors = matrices @ vectors
            lengths = torch.linalg.vector_norm(vectors, dim=(-2, -1), keepdim=True)
            vectors = vectors / lengths.clamp_min(1e-30)
        chosen = lengths.flatten().topk(count).indices
        real, imag = real[chosen], imag[chosen]
    try:
        return float(torch.linalg.eigvalsh(torch.complex(real, imag))[..., -1].max())
    except torch.linalg.LinAlgError:
        return 0.0


def _shift_excess(
    real: Tensor, imag: Tensor | None, level: Tensor, error: Tensor, factor_dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(batch)``: how much above ``level`` the largest eigenvalue may be; NaN or Inf where no factor was found."""
    parts = []
    members = max(1, _CACHED_ENTRIES // max(1, real.shape[-1] ** 2))
    for first in range(0, len(real), members):
        some = slice(first, first + members)
        parts.append(_excess(real[some], None if imag is None else imag[some], level[some], error[some], factor_dtype))
    return torch.cat(parts)


def _excess(real: Tensor, imag: Tensor | None, level: Tensor, error: Tensor, factor_dtype: torch.dtype) -> Tensor:
    n = real.shape[-1]
    shifted = -real
    shifted.diagonal(dim1=-2, dim2=-1).add_(level.unsqueeze(-1))
    trace = shifted.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    if imag is None:
        factor, failed = torch.linalg.cholesky_ex(shifted.to(factor_dtype))
        factor = factor.double()
        residual = frobenius_bound(shifted.baddbmm_(factor, factor.mT, alpha=-1))
    else:
        # the conjugate of B, whose imaginary part is that of H
        factor, failed = torch.linalg.cholesky_ex(torch.complex(shifted.to(factor_dtype), imag.to(factor_dtype)))
        both = torch.cat((factor.real, factor.imag), -1).double()
        mixed = both[..., n:] @ both[..., :n].mT
        residual = frobenius_bound(shifted.baddbmm_(both, both.mT, alpha=-1), (imag - mixed).add_(mixed.mT))
    # ‖L‖_F² is the trace of L Lᵀ, at most tr B + √n ‖B − L Lᵀ‖_F; the factor covers the rounding of both
    size = (trace + math.sqrt(n) * residual) * (1 + 2.0**-20)
    # products: γ |L||L|ᵀ per real part, at most γ ‖L‖_F² each; differences, and the diagonal of B: relative to
    # |B| + |L||L|ᵀ, and so to the residual and to |L||L|ᵀ
    rounding = 4 * gamma(2 * n + 8) * (size + residual) + n * n * 4 * TINY
    excess = (residual + rounding + error) * UP
    return torch.where(failed == 0, excess, torch.nan)
