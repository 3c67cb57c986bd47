"""Orthonormal rows or columns by Householder reflections, with signs fixed."""

from torch import Tensor

from orthogonium.linalg._gram_schmidt import gram_schmidt
from orthogonium.linalg._precision import in_working_precision


@in_working_precision
def qr_orthogonalize(matrix: Tensor) -> Tensor:
    """The Gram–Schmidt factor of the shorter side, to full precision for every condition number.

    The triangular factor gets a non-negative diagonal, which makes the result unique and continuous wherever ``matrix``
    has full rank.

    Args:
        matrix: ``(..., m, n)``, of any scale and rank.

    Returns:
        ``(..., m, n)``. Rows (columns) that depend on earlier ones are completed by reflections and have gradient zero;
        zero becomes the identity's first rows or columns.

    Raises:
        ValueError: fewer than two dimensions, or NaN or Inf in ``matrix``.
        TypeError: not real floating point.

    Source:
        Golub and Van Loan, *Matrix Computations*, 4th ed., section 5.2.
    """
    return gram_schmidt(matrix, "householder")
