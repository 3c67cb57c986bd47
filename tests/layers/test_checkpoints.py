"""Checkpoints load as they do into torch's layers: assigned where asked for, refused where shapes differ."""

import pytest
import torch
from torch import nn

from orthogonium.layers import OrthoConv2d, OrthoLinear
from orthogonium.linalg import orthogonality_defect
from orthogonium.reparametrizers import PRESETS


def constrained(preset="default"):
    params = PRESETS[preset]
    return nn.Sequential(OrthoLinear(4, 4, ortho_params=params), OrthoConv2d(4, 6, 3, ortho_params=params))


def assert_materialised(model):
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert orthogonality_defect(model[0].weight) < 1e-5
    model[1](torch.randn(1, 4, 5, 5, dtype=model[1].bias.dtype))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plain_checkpoint_is_assigned_to_a_model_on_the_meta_device(preset):
    with torch.device("meta"):
        model = constrained(preset)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 6, 3)).double()
    model.load_state_dict(plain.state_dict(), assign=True)
    assert_materialised(model)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.float64


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_of_another_preset_is_assigned_too(preset):
    source = constrained(preset)
    for target in ("default", "qr", "cayley"):
        with torch.device("meta"):
            model = constrained(target)
        model.load_state_dict(source.state_dict(), assign=True)
        assert_materialised(model)
        torch.testing.assert_close(model[0].weight, source[0].weight)


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_weight_of_another_shape_is_refused(strict):
    layer = OrthoLinear(4, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*\[3, 4\].*\[4, 4\]") as caught:
        layer.load_state_dict({"weight": torch.zeros(3, 4), "bias": layer.bias.detach()}, strict=strict)
    assert "Missing" not in str(caught.value)
    assert torch.equal(layer.weight, before)
