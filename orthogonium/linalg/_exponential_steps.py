"""``exp(A)`` by products: a Taylor polynomial of degree 8 in three of them, squared as often as needed; its reverse."""

import math

import torch
from torch import Tensor

from orthogonium.linalg._products import add_product, add_product_

# exp(x) to degree 8 as y0 + y1 x + y2 x² + (x3 x² + q)(x4 + x5 x + x6 x² + x7 q) with q = x² (x1 x + x2 x²).
# Source: Bader, Blanes and Casas, "Computing the matrix exponential with an optimized Taylor polynomial approximation",
# Mathematics 7(12), 2019, equation (10).
_R = math.sqrt(177.0)
_X3 = 2.0 / 3.0
_X1 = (1.0 + _R) / 88.0 * _X3
_X2 = (1.0 + _R) / 352.0 * _X3
_X4 = (-271.0 + 29.0 * _R) / (315.0 * _X3)
_X5 = 11.0 * (-1.0 + _R) / (1260.0 * _X3)
_X6 = 11.0 * (-9.0 + _R) / (5040.0 * _X3)
_X7 = (89.0 - _R) / (5040.0 * _X3 * _X3)
_Y2 = (857.0 - 58.0 * _R) / 630.0


def squarings_for(norm: float, dtype: torch.dtype) -> int:
    """How often ``A`` is halved so that the first neglected term, ``‖A‖⁹/9!``, is below rounding."""
    reach = (math.factorial(9) * torch.finfo(dtype).eps) ** (1 / 9)
    return max(0, math.ceil(math.log2(norm / reach))) if norm > reach else 0


def _taylor(a: Tensor, square: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``(T₈(A) − I, intermediates)``."""
    square = a @ a if square is None else square
    mixed = _X1 * a + _X2 * square
    fourth = square @ mixed
    left = _X3 * square + fourth
    right = _X5 * a + _X6 * square + _X7 * fourth
    right.diagonal(dim1=-2, dim2=-1).add_(_X4)
    return a + _Y2 * square + left @ right, (square, mixed, left, right)


def _squared(excess: Tensor) -> Tensor:
    """``(I + E)² − I``: without the identity, small ``E`` keep their digits, as often as they are squared."""
    return add_product(excess, excess, excess, scale=1.0, addend_scale=2.0)


def _plus_identity_(excess: Tensor) -> Tensor:
    excess.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return excess


def expm(a: Tensor, squarings: int, square: Tensor | None = None) -> Tensor:
    """``exp(A)`` for ``(..., n, n)``, by ``3 + squarings`` products, one less with ``A²`` at hand.

    To rounding in terms of ``max(1, ‖exp A‖)``, which is one for a skew ``A``, however often it is squared.
    """
    excess, _ = _taylor(a * 0.5**squarings, None if square is None else square * 0.25**squarings)
    for _ in range(squarings):
        excess = _squared(excess)
    return _plus_identity_(excess)


def expm_reverse(a: Tensor, squarings: int, grad: Tensor, square: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of ``<grad, exp(A)>`` in ``A``, and ``exp(A)``: the steps again, then back, two products each."""
    a = a * 0.5**squarings
    excess, (square, mixed, left, right) = _taylor(a, None if square is None else square * 0.25**squarings)
    powers = [excess]
    for _ in range(squarings):
        powers.append(_squared(powers[-1]))
    for power in reversed(powers[:-1]):  # G (I + E)ᵀ + (I + E)ᵀ G
        grad = add_product_(add_product(grad, grad, power.mT, scale=1.0, addend_scale=2.0), power.mT, grad, scale=1.0)
    left_grad, right_grad = grad @ right.mT, left.mT @ grad
    fourth_grad = left_grad + _X7 * right_grad
    mixed_grad = square.mT @ fourth_grad
    square_grad = _Y2 * grad + _X3 * left_grad + _X6 * right_grad + fourth_grad @ mixed.mT + _X2 * mixed_grad
    a_grad = grad + _X5 * right_grad + _X1 * mixed_grad + square_grad @ a.mT + a.mT @ square_grad
    return a_grad * 0.5**squarings, _plus_identity_(powers[-1])
