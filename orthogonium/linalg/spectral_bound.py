"""The largest singular value, from above, with the rounding of its own computation included."""

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._eigenvalue_bound import largest_eigenvalue_bound, trace_bound
from orthogonium.linalg._precision import raise_if_not_finite, scaled_to_one, times_power_of_two
from orthogonium.linalg._rounding import TINY, UP, frobenius_bound, gamma, in_float64, keeps_subnormals

_MODES = ("tight", "cheap")


def spectral_norm_bound(matrix: Tensor, mode: str = "tight") -> Tensor:
    """Never below ``‖A‖₂`` of the matrix as given: its rounding, and that of this computation, are included.

    The Gram matrix on the shorter side is computed in float64, after a scaling by a power of two, which is exact.

    - ``"tight"`` proves a number just above the largest eigenvalue by a Cholesky factor whose residual is checked:
      within about 1e-9 of the truth. Costs that of ``eigvalsh`` and of two products more.
    - ``"cheap"`` is one Gram matrix and its Frobenius distance from a multiple of the identity: exact to rounding for
      orthogonal matrices and for rank one, several times too large for a Gaussian matrix.

    Nothing is differentiated. For an estimate from below, see
    :func:`~orthogonium.linalg.power_iteration.power_iteration`.

    Args:
        matrix: ``(..., m, n)``, float16, bfloat16, float32 or float64.
        mode: ``"tight"`` or ``"cheap"``.

    Returns:
        ``(...)``, float64, on the device of ``matrix`` (the CPU for devices without float64): zero for zero and empty
        matrices, infinite where the norm leaves float64.

    Raises:
        TypeError: ``matrix`` is complex or not floating-point.
        NonFiniteError: it holds NaN or Inf.
        ValueError: fewer than two dimensions, or an unknown mode.

    Source:
        Rump, "Verification methods: rigorous results using floating-point arithmetic", Acta Numerica 19, 2010;
        Wolkowicz and Styan, "Bounds for eigenvalues using traces", Linear Algebra Appl. 29, 1980.
    """
    check_matrix("matrix", matrix)
    check_floating("matrix", matrix)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'tight' or 'cheap', got {mode!r}")
    raise_if_not_finite("matrix", matrix)
    exact = in_float64(matrix)
    batch, (m, n) = exact.shape[:-2], exact.shape[-2:]
    if exact.numel() == 0:
        return exact.new_zeros(batch)
    scaled, exponent = scaled_to_one(exact.reshape(-1, m, n))
    bound = unit_norm_bound(scaled, mode)
    result = times_power_of_two(bound, exponent.flatten())
    back = times_power_of_two(result, -exponent.flatten())
    result = torch.where(back < bound, torch.nextafter(result, torch.full_like(result, torch.inf)), result)
    result = torch.where(scaled.flatten(1).any(1), result, 0.0)
    if not keeps_subnormals(matrix.device):  # entries that were read as zero
        result = (result + (m * n) ** 0.5 * torch.finfo(matrix.dtype).tiny) * UP
    return result.reshape(batch)


def unit_norm_bound(matrix: Tensor, mode: str = "tight") -> Tensor:
    """The same for ``(batch, m, n)`` in float64 with entries of size about one; ``(batch)``."""
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    n, k = short.shape[-2:]
    frobenius = frobenius_bound(short)
    gram = short @ short.mT
    # |fl(A Aᵀ) − A Aᵀ| ≤ γ_k |A||A|ᵀ entrywise, whose Frobenius norm is at most γ_k ‖A‖_F². Products of entries
    # below 2⁻⁵⁰⁰ may underflow: n·k of them for each of n rows
    error = 2 * gamma(k + 2) * frobenius.square() + n * n * k * TINY
    squared = largest_eigenvalue_bound(gram, error) if mode == "tight" else trace_bound(gram, None, error)
    return torch.minimum(squared.clamp_min(0).sqrt() * UP, frobenius) * UP
