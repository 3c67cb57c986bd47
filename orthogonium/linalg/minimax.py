"""Polynomials that send an interval of singular values to one, as well as a polynomial can."""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from orthogonium.linalg._products import symmetric_product

Quintic = tuple[float, float, float]  # the coefficients of a x + b x³ + c x⁵


def best_odd_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic ``a x + b x³ + c x⁵`` closest to 1 on ``[low, high]``, and its error there.

    The best one touches the error with alternating signs at four points (Chebyshev): both ends and
    the two stationary points between. Each round of the Remez exchange solves for the coefficients and the
    error at the current points, then moves the inner points to the roots of the derivative.

    Args:
        low, high: ``0 < low < high``.

    Returns:
        ``(a, b, c)`` and the largest ``|1 − p(x)|`` on the interval.

    Source:
        Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, section 3.
    """
    inner = [low + (high - low) * t for t in (0.3, 0.8)]
    coefficients, error = (1.0, 0.0, 0.0), 1.0
    for _ in range(60):
        points = torch.tensor([low, *inner, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        coefficients = (a, b, c)
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        if c == 0.0 or (-3 * b - root) / (10 * c) <= 0.0:
            break
        moved = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        settled = max(abs(m - i) for m, i in zip(moved, inner, strict=True)) <= 1e-14 * high
        inner = moved
        if settled:
            break
    return coefficients, abs(error)


def greedy_quintics(lowest: float) -> Iterator[tuple[Quintic, float, float]]:
    """Quintics that take ``[lowest, 1]`` towards one, each the best for the interval that the one before leaves.

    The composition is optimal among all compositions of quintics (Polar Express, theorem 4.1). Small singular values
    grow by up to 8 a step; close to one the error is cubed. Each interval is widened by 0.1 % so that rounding cannot
    leave it.

    Yields:
        ``(a, b, c)`` and the interval it leads to, without end.
    """
    low, high = lowest, 1.0
    while True:
        spread = (high - low) / 2
        if spread < 1e-3:  # the limit of the minimax steps: 1 + x becomes 1 + 5/2 x³ + ...
            coefficients, error = (15 / 8, -10 / 8, 3 / 8), 3 * spread**3
        else:
            coefficients, error = best_odd_quintic(low, 1.001 * high)
        a, b, c = coefficients  # the error is largest at the lower end, where 1 - error would round to zero
        low, high = (low * (a + low**2 * (b + c * low**2)) if error > 0.5 else 1 - error), 1 + error
        yield coefficients, low, high


@lru_cache
def polar_schedule(lowest: float, tolerance: float) -> tuple[Quintic, ...]:
    """The :func:`greedy_quintics` that take ``[lowest, 1]`` to within ``tolerance`` of one."""
    schedule = []
    for coefficients, _, high in greedy_quintics(lowest):
        schedule.append(coefficients)
        if high - 1 <= tolerance:
            break
    return tuple(schedule)


@lru_cache
def inverse_sqrt_coefficients(degree: int, radius: float) -> tuple[float, ...]:
    """Coefficients, lowest first, of a polynomial close to ``(1 + x)^(−1/2)`` on ``[−radius, radius]``.

    Interpolation at the Chebyshev nodes, solved in float64 in the scaled variable ``x / radius``: within a
    small factor of the best polynomial of that degree.
    """
    nodes = [math.cos(math.pi * (2 * i + 1) / (2 * (degree + 1))) for i in range(degree + 1)]
    points = torch.tensor(nodes, dtype=torch.float64)
    values = (1 + radius * points).rsqrt()
    scaled = torch.linalg.solve(torch.linalg.vander(points), values)
    return tuple(c / radius**i for i, c in enumerate(scaled.tolist()))


@lru_cache
def inverse_sqrt_radius(degree: int, tolerance: float) -> float:
    """The largest radius at which :func:`inverse_sqrt_coefficients` keep a relative error of ``tolerance``."""
    low, high = 0.0, 0.9
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for _ in range(30):
        radius = (low + high) / 2
        coefficients = inverse_sqrt_coefficients(degree, radius)
        x = radius * grid
        value = torch.zeros_like(x)
        for c in reversed(coefficients):
            value = value * x + c
        error = (value * (1 + x).sqrt() - 1).abs().max().item()
        low, high = (radius, high) if error <= tolerance else (low, radius)
    return low


@lru_cache
def inverse_coefficients(radius: float, tolerance: float) -> tuple[float, ...]:
    """Coefficients, lowest first, of the shortest ``p`` with ``|1 − (1 + x) p(x)| ≤ tolerance`` for ``|x| ≤ radius``.

    The least such residual of degree ``k`` is ``1 / T_k(1 / radius)``, with the Chebyshev polynomial ``T_k``, at whose
    zeros ``p`` interpolates ``1 / (1 + x)``.

    Args:
        radius: in ``(0, 1)``.
        tolerance: in ``(0, 1)``.

    Source: Golub and Varga, Numerische Mathematik 3, 1961 (Chebyshev semi-iteration).
    """
    count = max(1, math.ceil(math.acosh(1 / tolerance) / math.acosh(1 / radius)))
    if count == 1:  # whose zero is zero
        return (1.0,)
    nodes = torch.tensor([math.cos(math.pi * (2 * i + 1) / (2 * count)) for i in range(count)], dtype=torch.float64)
    scaled = torch.linalg.solve(torch.linalg.vander(nodes), 1 / (1 + radius * nodes))
    return tuple(c / radius**i for i, c in enumerate(scaled.tolist()))


def matrix_polynomial(matrix: Tensor, coefficients: tuple[float, ...], square: Tensor) -> Tensor:
    """``Σ cᵢ Xⁱ`` for batched symmetric ``X``, with ``X²`` given, by blocks (Paterson and Stockmeyer, 1973).

    Degree 2 needs no further product, 4 one, 6 two, 8 three, 3j + 2 in general j + 1.
    """
    degree = len(coefficients) - 1
    powers = [matrix, square] if degree <= 4 else [matrix, square, symmetric_product(square, matrix)]
    block = len(powers)

    def terms(start: int, stop: int) -> Tensor:
        """``c[start] I + c[start + 1] X + ... + c[stop − 1] X^(stop − 1 − start)``."""
        total = powers[0] * coefficients[start + 1] if stop - start > 1 else torch.zeros_like(matrix)
        for power, c in zip(powers[1:], coefficients[start + 2 : stop], strict=False):
            total = total.add_(power, alpha=c)
        total.diagonal(dim1=-2, dim2=-1).add_(coefficients[start])
        return total

    start = max((degree - 1) // block, 0) * block
    result = terms(start, degree + 1)
    for first in range(start - block, -1, -block):
        result = terms(first, first + block).add_(symmetric_product(powers[-1], result))
    return result
