"""Certificates of networks with convolutions: bounds never below the operator, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.certification import plain_network


def network(mode="circular", dtype=torch.float32):
    torch.manual_seed(0)
    first = og.OrthoConv2d(1, 4, 3, padding_mode=mode, dtype=dtype)
    second = og.OrthoConv2d(4, 16, 3, stride=2, padding_mode=mode, dtype=dtype)
    layers = [nn.Flatten(), nn.Unflatten(1, (1, 6, 6)), first, og.MaxMin(), second, og.MaxMin()]
    return nn.Sequential(*layers, nn.Flatten(), og.OrthoLinear(144, 3, dtype=dtype)).eval()


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_radii_survive_an_attack_and_the_error_bound_covers_float32(mode):
    model = network(mode)
    x = torch.randn(64, 36, generator=torch.Generator().manual_seed(1))
    certificate = og.certify(model, x)
    assert 1 <= certificate.lipschitz < 1 + 1e-4
    double = plain_network(model)
    logits = double(x.double())
    assert torch.equal(logits.argmax(1), certificate.prediction)
    assert (certificate.radius > 0).all()
    torch.testing.assert_close(model(x).double(), logits, rtol=0, atol=1e-5)
    assert (certificate.error > 0).all()
    assert (certificate.error < 1e-11).all()
    coarse = og.certify(model, x, precision=torch.float32).error
    assert ((model(x).double() - logits).norm(dim=1) <= coarse).all()
    steps = torch.randn(200, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps = steps / steps.norm(dim=2, keepdim=True) * certificate.radius[:, None] * 0.999
    attacked = double((x.double() + steps).flatten(0, 1))
    assert (attacked.argmax(1).view(200, -1) == certificate.prediction).all()


def test_sides_that_a_layer_refuses_are_said_with_its_path():
    model = nn.Sequential(og.OrthoConv2d(1, 4, 3, stride=2), nn.Flatten(), og.OrthoLinear(36, 3)).eval()
    with pytest.raises(ValueError, match=r"^0 cannot take an input of shape \(2, 1, 1, 1\)"):
        og.certify(model, torch.randn(2, 1, 1, 1))


def test_the_model_is_left_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    og.lipschitz_bound(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
