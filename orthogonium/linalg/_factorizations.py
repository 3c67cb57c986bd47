"""Factors of symmetric matrices, at sides that are bad for LAPACK as fast as at others, and inverses of definite ones.

LAPACK's Cholesky factorisation works without blocks up to side 128, and where the rows of a matrix are a power of two
apart its columns fall into few sets of the cache. A few more rows and columns that have nothing to do with the others
avoid both: a third off at side 128, a tenth at 1024.
"""

import torch
from torch import Tensor

from orthogonium.linalg._products import add_product, lower_product, product

_MORE = 8
_BAD_FOR_CHOLESKY, _BAD_FOR_EIGENVECTORS = 128, 512  # sides, and their multiples
_LOWER_TRIANGLE = 128  # up to this side eigenvectors come from the lower triangle 2 to 8 % sooner, beyond it later
_WHOLE = 128  # up to this side LAPACK inverts at once


def gram_factor(matrix: Tensor) -> Tensor:
    """``L`` with ``L Lᵀ = W Wᵀ``, ``(..., m, m)``, lower triangular; anything where the factorisation fails."""
    rows = matrix.shape[-2]
    if rows % _BAD_FOR_CHOLESKY or matrix.is_cuda:
        return torch.linalg.cholesky_ex(lower_product(matrix, matrix.mT)).L
    larger, inner = _larger(matrix, rows)
    lower_product(matrix, matrix.mT, out=inner)
    larger[..., rows:, rows:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor = torch.linalg.cholesky_ex(larger).L
    return factor.mT[..., :rows, :rows].contiguous().mT  # by columns, and no longer than needed


def eigenbasis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """``(λ, V)`` of a positive semidefinite ``G = V diag(λ) Vᵀ``, ``(..., m, m)``, ascending.

    Read by columns and from the triangle with which LAPACK is quicker; ``G`` is symmetric.
    """
    rows = gram.shape[-1]
    if rows % _BAD_FOR_EIGENVECTORS or gram.is_cuda:
        return tuple(torch.linalg.eigh(gram.mT, UPLO="L" if rows <= _LOWER_TRIANGLE else "U"))
    larger, inner = _larger(gram, rows)
    inner.copy_(gram)
    larger[..., :rows, rows:] = 0.0
    values, basis = torch.linalg.eigh(larger.mT, UPLO="U")
    return values[..., _MORE:], basis.mT[..., _MORE:, :rows].contiguous().mT  # those of the zeros come first


def definite_inverse(matrix: Tensor) -> Tensor:
    """``A⁻¹``, ``(..., n, n)``, for ``A + Aᵀ`` positive definite: by blocks, without pivots, mostly in products.

    Elimination keeps the definiteness, so that no pivots are needed: Golub and Van Loan, "Unsymmetric positive definite
    linear systems", Linear Algebra Appl. 28, 1979. For ``I − S/2`` with ``S`` skew and ``‖S‖₂ ≤ 64`` its error is that
    of LAPACK's inverse with pivots. Not differentiable.
    """
    rows = matrix.shape[-1]
    if rows <= _WHOLE:
        return torch.linalg.inv_ex(matrix).inverse
    inverse = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    half = rows // 2
    top, bottom = matrix.split((half, rows - half), dim=-2)
    (first, right), (left, last) = (part.split((half, rows - half), dim=-1) for part in (top, bottom))
    first_inverse = definite_inverse(first)
    below = product(left, first_inverse)
    last_inverse = definite_inverse(add_product(last, below, right, scale=-1.0))
    beside = product(product(first_inverse, right).neg_(), last_inverse)
    inverse[..., half:, half:] = last_inverse
    inverse[..., :half, half:] = beside
    inverse[..., half:, :half] = product(last_inverse, below).neg_()
    inverse[..., :half, :half] = add_product(first_inverse, beside, below, scale=-1.0)
    return inverse


def _larger(like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A matrix with room, zero in the last rows and undefined elsewhere, and its upper left block."""
    larger = like.new_empty((*like.shape[:-2], rows + _MORE, rows + _MORE))
    larger[..., rows:, :] = 0.0
    return larger, larger[..., :rows, :rows]
