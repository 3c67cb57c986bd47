import pytest
import torch
from torch import nn
from torch.testing import assert_close

import orthogonium as og
from orthogonium.layers import singular_values
from tests.operators import explicit, materialise


def plain(dims, *args, **kwargs):
    torch.manual_seed(0)
    return getattr(nn, f"Conv{dims}d")(*args, **kwargs, bias=False)


CASES = {
    "circular": (plain(2, 3, 4, 3, padding=1, padding_mode="circular"), (5, 6)),
    "circular stride": (
        plain(2, 3, 8, (2, 4), stride=(1, 2), padding=(0, 1), padding_mode="circular"),
        (5, 6),
    ),
    "circular groups dilation": (
        plain(1, 4, 6, 3, dilation=2, padding=2, groups=2, padding_mode="circular"),
        (7,),
    ),
    "three dimensions": (plain(3, 2, 2, 3, padding=1, padding_mode="circular"), (3, 4, 3)),
    "zeros": (plain(2, 3, 4, 3, stride=2, padding=2), (5, 6)),
    "circular overlapping": (plain(2, 2, 2, 3, padding=2, padding_mode="circular"), (4, 5)),
    "zeros groups": (plain(2, 4, 4, 3, padding="same", groups=2), (4, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_spectrum_is_that_of_the_operator(case):
    layer, sides = CASES[case]
    around = layer._reversed_padding_repeated_twice
    pads = [(around[2 * i], around[2 * i + 1]) for i in reversed(range(len(sides)))]
    circular = layer.padding_mode == "circular"
    matrix = explicit(layer.weight, sides, layer.stride, layer.dilation, pads, circular, layer.groups)
    values = singular_values(layer, (layer.in_channels, *sides))
    assert_close(values, torch.linalg.svdvals(matrix)[: len(values)], rtol=0, atol=1e-13)
    assert_close(singular_values(layer, (1, layer.in_channels, *sides), count=2), values[:2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_orthogonal_layers_both_directions(mode):
    for layer, sides in (
        (og.OrthoConv2d(4, 6, 3, stride=2, padding_mode=mode), (6, 4)),
        (og.OrthoConvTranspose2d(6, 4, 3, stride=2, padding_mode=mode), (3, 2)),
    ):
        values = singular_values(layer, (layer.in_channels, *sides))
        reference = torch.linalg.svdvals(materialise(layer, sides))
        assert_close(values, reference[: len(values)], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_output_padding_with_room_for_more_windows(mode):
    layer = og.OrthoConvTranspose2d(4, 2, 4, padding=1, output_padding=1, dilation=(2, 3), padding_mode=mode)
    reference = torch.linalg.svdvals(materialise(layer, (2, 8)))
    assert_close(singular_values(layer, (4, 2, 8)), reference, rtol=0, atol=1e-13)


def test_lanczos_beyond_the_size_that_can_be_written_out(monkeypatch):
    layer = plain(2, 3, 4, 3, padding=1)
    exact = singular_values(layer, (3, 8, 8))
    monkeypatch.setattr("orthogonium.layers.spectrum._LARGEST", 10)
    found = singular_values(layer, (3, 8, 8), count=3)
    assert_close(found, exact[:3], rtol=1e-6, atol=0)
    assert (found <= exact[:3] * (1 + 1e-12)).all()
    with pytest.raises(ValueError, match="192 inputs and 256 outputs"):
        singular_values(layer, (3, 8, 8))


def test_not_a_convolution():
    with pytest.raises(TypeError, match="must be a convolution"):
        singular_values(nn.Linear(2, 2), (2,))
