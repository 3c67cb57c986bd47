"""Orthonormal rows or columns from a Cholesky factor: the cheapest exact way."""

from torch import Tensor

from orthogonium.linalg._gram_schmidt import gram_schmidt
from orthogonium.linalg._precision import in_working_precision


@in_working_precision
def cholesky_orthogonalize(matrix: Tensor, stable: bool = False) -> Tensor:
    """The Gram–Schmidt factor of the shorter side: ``L⁻¹ W`` with ``L Lᵀ = W Wᵀ`` for a wide matrix.

    One factorisation of the smaller Gram matrix, then a check of ``Q Qᵀ``: a small error is corrected to first order, a
    larger one sends the work to float64, and to Householder reflections where even that is too ill conditioned. So the
    result is orthogonal to rounding for every input, and for a matrix of full rank equal to that of
    :func:`qr_orthogonalize`.

    Args:
        matrix: ``(..., m, n)``, of any scale and rank.
        stable: accept the first factorisation only where its error is at rounding level, so that ``Q`` is accurate to
            ``eps κ`` instead of ``eps κ²`` (κ the condition number). Slower for ill-conditioned input alone.

    Returns:
        ``(..., m, n)``. Rows (columns) that depend on earlier ones to rounding are completed deterministically (not
        as QR
        does: what rounding left of them decides) and have gradient zero.

    Raises:
        ValueError: fewer than two dimensions, or NaN or Inf in ``matrix``.
        TypeError: not real floating point.

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 44,
        2015.
    """
    return gram_schmidt(matrix, "cholesky_stable" if stable else "cholesky")
