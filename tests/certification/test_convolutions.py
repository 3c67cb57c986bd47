"""Certificates of networks with convolutions: bounds never below the operator, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import orthogonium as og
from orthogonium.certification import plain_network
from orthogonium.certification.kernel_norms import _absolute_kernel_norm_upper_bound, _kernel_norm_upper_bound
from tests.operators import explicit


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 2),
    out=st.integers(1, 4),
    inner=st.integers(1, 4),
    groups=st.integers(1, 2),
    k=st.integers(1, 4),
    s=st.integers(1, 3),
    circular=st.booleans(),
    decades=st.floats(-30, 30),
    seed=st.integers(0, 10**6),
)
def test_never_below_the_operator(dims, out, inner, groups, k, s, circular, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out * groups, inner, *(k,) * dims, generator=generator, dtype=torch.float64) * 10**decades
    sides, stride = (6,) * dims, (s,) * dims
    pads = [(max(0, k - s) // 2, max(0, k - s) - max(0, k - s) // 2)] * dims
    matrix = explicit(weight, sides, stride, (1,) * dims, pads, circular, groups)
    bound = _kernel_norm_upper_bound(weight, stride, groups)
    assert torch.linalg.matrix_norm(matrix, ord=2) <= bound * (1 + 1e-12)  # what the reference itself rounds
    absolute = _absolute_kernel_norm_upper_bound(weight, groups)
    assert torch.linalg.matrix_norm(matrix.abs(), ord=2) <= absolute * (1 + 1e-12)


@pytest.mark.parametrize(
    ("sizes", "keywords"), [((4, 8, 3), {}), ((8, 4, 5), {"stride": 2}), ((4, 16, 3), {"stride": 2})]
)
def test_tight_for_orthogonal_kernels(sizes, keywords):
    torch.manual_seed(0)
    layer = og.OrthoConv2d(*sizes, **keywords, dtype=torch.float64)
    bound = _kernel_norm_upper_bound(layer.weight, layer.stride, 1)
    assert 1 - 1e-12 <= bound <= 1 + 1e-11


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
