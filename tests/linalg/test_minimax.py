import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthogonium.linalg.minimax import (
    best_odd_quintic,
    inverse_coefficients,
    inverse_sqrt_coefficients,
    inverse_sqrt_radius,
    matrix_polynomial,
    polar_schedule,
)
from tests.helpers import gaussian


def quintic(coefficients, x):
    a, b, c = coefficients
    return x * (a + x**2 * (b + c * x**2))


@given(low=st.floats(1e-6, 0.95))
def test_the_best_quintic_touches_its_error_four_times(low):
    """Chebyshev: alternating extrema of equal size are what makes it best."""
    coefficients, error = best_odd_quintic(low, 1.0)
    x = torch.linspace(low, 1.0, 20001, dtype=torch.float64)
    deviation = quintic(coefficients, x) - 1
    assert deviation.abs().max() <= error * (1 + 1e-6) + 1e-12
    ends = deviation[[0, -1]]
    assert (ends.abs() >= error * (1 - 1e-4) - 1e-12).all()
    inside = deviation[1:-1]
    assert min(inside.max(), -inside.min()) >= error * (1 - 1e-3) - 1e-12
    assert ends[0] < 0 < ends[1] or error < 1e-10


@pytest.mark.parametrize("tolerance", [2.0**-23, 2.0**-52], ids=["float32", "float64"])
@pytest.mark.parametrize("lowest", [0.9, 0.5, 1e-1, 1e-3, 1e-8, 1e-17], ids=str)
def test_the_schedule_takes_its_interval_to_one(lowest, tolerance):
    x = torch.logspace(torch.tensor(lowest).log10().item(), 0, 4001, dtype=torch.float64).clamp(lowest, 1.0)
    for coefficients in polar_schedule(lowest, tolerance):
        x = quintic(coefficients, x)
        assert x.min() > 0
    assert (x - 1).abs().max() <= 4 * tolerance


def test_the_schedule_is_short():
    """The lengths that Polar Express reaches for float32, one more for the 0.1 % of safety."""
    for lowest, steps in [(1 / 2, 3), (1 / 5, 4), (1 / 30, 5), (1e-2, 6), (1e-3, 7), (1e-4, 9)]:
        assert len(polar_schedule(lowest, 3e-8)) <= steps + 1


@pytest.mark.parametrize("tolerance", [2.0**-22, 2.0**-51], ids=["float32", "float64"])
@pytest.mark.parametrize("degree", [2, 4, 6, 8, 11, 14])
def test_inverse_square_root(degree, tolerance):
    radius = inverse_sqrt_radius(degree, tolerance)
    assert 0 < radius < 1
    x = torch.linspace(-radius, radius, 9973, dtype=torch.float64)
    value = sum(c * x**i for i, c in enumerate(inverse_sqrt_coefficients(degree, radius)))
    error = (value * (1 + x).sqrt() - 1).abs().max()
    assert error <= 1.01 * tolerance + 4 * 2.0**-52  # evaluated in float64 here, too
    beyond = sum(c * (1.3 * x) ** i for i, c in enumerate(inverse_sqrt_coefficients(degree, radius)))
    assert (beyond * (1 + 1.3 * x).sqrt() - 1).abs().max() > tolerance  # the radius is not given away


@given(radius=st.floats(1e-6, 0.55), digits=st.integers(1, 14))
def test_inverse(radius, digits):
    """No coefficient too many: the best residual with one less is above the tolerance."""
    tolerance = 10.0**-digits
    coefficients = inverse_coefficients(radius, tolerance)
    x = torch.linspace(-radius, radius, 997, dtype=torch.float64)
    residual = 1 - (1 + x) * sum(c * x**i for i, c in enumerate(coefficients))
    assert residual.abs().max() <= 1.01 * tolerance + 16 * 2.0**-52
    shorter = len(coefficients) - 1  # and its best residual, 1 over the Chebyshev polynomial of that degree
    assert shorter == 0 or 1 / math.cosh(shorter * math.acosh(1 / radius)) > tolerance


@given(degree=st.integers(1, 16), seed=st.integers(0, 99))
def test_matrix_polynomial(degree, seed):
    matrix = 0.3 * gaussian((2, 4, 4), seed=seed)
    coefficients = tuple(gaussian((degree + 1,), seed=seed + 1).tolist())
    expected, power = torch.zeros_like(matrix), torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    for c in coefficients:
        expected, power = expected + c * power, power @ matrix
    untouched = matrix.clone()
    found = matrix_polynomial(matrix, coefficients, matrix @ matrix)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, untouched)
