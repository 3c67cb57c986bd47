import itertools

import pytest
import torch

from orthogonium._checks import as_tuple
from orthogonium.layers import OrthoConv1d
from orthogonium.layers._geometry import ConvGeometry, reads_twice
from tests.operators import allowance, explicit, spectrum


def test_counting_agrees_with_the_list_of_positions():
    for side, windows, k, s, d in itertools.product(range(1, 13), range(1, 13), range(1, 5), range(1, 5), range(1, 4)):
        read = [(s * p + d * r) % side for p in range(windows) for r in range(min(k, s))]
        assert reads_twice(side, windows, k, s, d) == (len(set(read)) < len(read)), (side, windows, k, s, d)


@pytest.mark.parametrize(("k", "s", "d"), [(3, 1, 1), (3, 2, 1), (4, 3, 1), (2, 3, 1), (3, 2, 3), (3, 3, 2), (5, 3, 2)])
def test_the_rule_is_exact(k, s, d):
    """Every refused side would break the bound, every accepted one keeps it."""
    torch.manual_seed(0)
    weight = OrthoConv1d(4, 4, k, stride=s, dilation=d, dtype=torch.float64).weight
    refused = 0
    for total, side in itertools.product(range(d * (k - 1) + s + 1), range(2, 13)):
        geometry = ConvGeometry((k,), (s,), (d,), ((total // 2, total - total // 2),), True)
        if geometry.windows(0, side) < 1 or total - total // 2 > side or total == 0:
            continue
        matrix = explicit(weight, (side,), (s,), (d,), geometry.pads, True, 1)
        largest = spectrum(matrix)[-1]
        if geometry.fits(0, side):
            assert largest <= 1 + allowance(matrix, torch.float64)
        else:
            refused += 1
            assert largest > 1.02, (total, side)
    assert refused


@pytest.mark.parametrize(
    ("k", "s", "d", "pads"), [(3, 1, 1, (1, 1)), (4, 1, 2, (3, 3)), (3, 2, 1, (0, 1)), (2, 3, 1, (0, 0))]
)
def test_same_padding(k, s, d, pads):
    geometry = ConvGeometry.make((k,), (s,), (d,), "same", "circular")
    assert geometry.pads == (pads,)
    for side in range(s, 20):
        if geometry.fits(0, side) and k >= s:
            assert geometry.windows(0, side) == side // s


def test_as_tuple():
    assert as_tuple("stride", 2, 3, 1) == (2, 2, 2)
    assert as_tuple("stride", [1, 2], 2, 1) == (1, 2)
    with pytest.raises(TypeError, match=r"stride must be an integer or 2 of them, got 1\.5"):
        as_tuple("stride", 1.5, 2, 1)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        as_tuple("stride", (1, 0), 2, 1)
