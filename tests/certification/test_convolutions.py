"""Certificates of networks with convolutions: bounds never below the operator, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.certification import certificates
from orthogonium.certification.sequential import read_sequential


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
    links = read_sequential(model)
    logits, positions = certificates._evaluate(links, x.double())
    assert torch.equal(logits.argmax(1), certificate.prediction)
    assert (certificate.radius > 0).all()
    torch.testing.assert_close(model(x).double(), logits, rtol=0, atol=1e-5)
    assert positions[2] == 36
    assert positions[4] == 9
    error = certificates._forward_error(links, positions, x.double().norm(dim=1))
    assert (error > 0).all()
    assert (error < 1e-11).all()
    steps = torch.randn(200, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps = steps / steps.norm(dim=2, keepdim=True) * certificate.radius[:, None] * 0.999
    attacked, _ = certificates._evaluate(links, (x.double() + steps).flatten(0, 1))
    assert (attacked.argmax(1).view(200, -1) == certificate.prediction).all()


def test_sides_that_the_stride_does_not_divide_are_not_certified():
    model = nn.Sequential(og.OrthoConv2d(1, 4, 3, stride=2), nn.Flatten(), og.OrthoLinear(36, 3)).eval()
    with pytest.raises(ValueError, match="certified on sides that it divides"):
        og.certify(model, torch.randn(2, 1, 7, 7))


def test_plain_convolutions_are_named():
    with pytest.raises(TypeError, match="0 is a Conv2d"):
        og.certify(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval(), torch.randn(1, 1, 4, 4))


def test_the_model_is_left_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    og.lipschitz_product(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
