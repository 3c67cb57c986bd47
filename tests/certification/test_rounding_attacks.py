"""Where rounding decides: certificates that hold, and the same without their rounding, which do not."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import orthogonium as og

_FILE = Path(__file__).parents[2] / "benchmarks" / "_rounding_attack.py"
_SPEC = importlib.util.spec_from_file_location("_rounding_attack", _FILE)
attacks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(attacks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_rounding_breaks_a_certificate_and_some_break_naive_ones(dtype):
    certified, tries, naive = 0, 0, 0
    for model in attacks.networks(dtype).values():
        x = attacks.near_boundaries(model, 8, dtype, seed=0)
        sound = attacks.attack_rounding(model, x, 100, dtype)
        assert sound.flips == 0
        certified, tries = certified + sound.certified, tries + sound.tries
        naive += attacks.attack_rounding(model, x, 30, dtype, count_rounding=False).broken
    assert certified >= 50
    assert tries >= 5000
    assert naive >= 10  # the search finds what is there to be found


def test_the_error_that_is_taken_off_is_what_protects(monkeypatch):
    """The certificates of this library with their rounding removed break under the same search."""
    model = attacks.networks(torch.float64)["a residual with large numbers"]
    x = attacks.near_boundaries(model, 20, torch.float64, seed=1)
    assert attacks.attack_rounding(model, x, 50, torch.float64).flips == 0

    def nothing(network, sizes, radius, *rest):
        return dict.fromkeys(network.steps, torch.zeros_like(radius))

    monkeypatch.setattr("orthogonium.certification.certificates.forward_error", nothing)
    assert attacks.attack_rounding(model, x, 50, torch.float64).broken >= 3


def test_a_margin_of_one_last_place_behind_a_large_bias():
    """Two logits of 2⁵² and a bit: the sum rounds the difference away or doubles it."""
    layer = nn.Linear(1, 2, dtype=torch.float64)
    layer.weight.data = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    layer.bias.data.fill_(2.0**52)
    x = torch.tensor([[0.5000001]], dtype=torch.float64)
    with torch.no_grad():
        assert (layer(x)[0, 0] - layer(x)[0, 1]).item() == 1.0  # twice the exact margin, 0.5000001
        assert (layer(x - 0.1)[0, 0] - layer(x - 0.1)[0, 1]).item() == 0.0  # a tenth away it is gone
    assert og.certify(layer.eval(), x).radius.item() == 0.0
    assert og.certify(layer, torch.tensor([[1000.0]], dtype=torch.float64)).radius.item() == pytest.approx(
        1000, rel=0.1
    )
