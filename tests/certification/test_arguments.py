"""Arguments that change what a call computes are honoured by its rule, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.certification import lipschitz_bound
from tests.certification.test_network_bound import written


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (lambda m, x: x.softmax(1, torch.bfloat16), (4,), "changes the precision"),
        (lambda m, x: torch.softmax(x, 1, torch.bfloat16), (4,), "changes the precision"),
        (lambda m, x: torch.log_softmax(x, 1, torch.bfloat16), (4,), "changes the precision"),
        (lambda m, x: x.norm(2, 1, False, torch.float64), (4,), "arguments by position"),
        (lambda m, x: torch.topk(x, 3, 1, True, False)[0], (4,), "sorted=False"),
        (lambda m, x: torch.roll(x, 1, []), (4,), "the batch among them"),
    ],
)
def test_what_an_argument_makes_wrong_is_refused(function, shape, message):
    with pytest.raises(TypeError, match=message):
        lipschitz_bound(written(function), shape)


def test_softplus_has_no_certificate_where_its_exponential_overflows():
    model = written(lambda m, x: F.softplus(x, threshold=1000))
    assert torch.isinf(model(torch.tensor([800.0], dtype=torch.float64)))
    assert lipschitz_bound(model).bound == 1
    with pytest.raises(TypeError, match="nothing is known about its rounding"):
        og.certify(model, torch.ones(1, 4))


def test_an_empty_stride_is_that_of_the_window():
    model = written(lambda m, x: F.max_pool1d(x, 2, (), 0, 2))
    assert lipschitz_bound(model, (1, 9)).bound == pytest.approx(2**0.5)


@pytest.mark.parametrize("corners", [None, True])
@pytest.mark.parametrize("factor", [0.55, 0.7, 1.3, 2.6])
def test_a_recomputed_scale_moves_the_positions(factor, corners):
    layer = nn.Upsample(None, factor, "linear", corners, recompute_scale_factor=True).eval()
    matrix = layer(torch.eye(9, dtype=torch.float64)[:, None]).flatten(1)
    bound = lipschitz_bound(layer, (1, 9)).bound
    assert bound == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)


def test_instance_norm_told_to_use_its_input_is_refused():
    layer = nn.InstanceNorm1d(4, track_running_stats=True).eval()
    layer.track_running_stats = False
    with pytest.raises(TypeError, match="computes statistics of its input"):
        lipschitz_bound(layer, (4, 3))


def test_padding_set_after_the_layer_was_made_is_refused():
    layer = nn.Conv2d(1, 1, 3, padding=2, padding_mode="replicate").eval()
    layer.padding = (0, 0)
    with pytest.raises(ValueError, match="Make a new layer"):
        lipschitz_bound(layer, (1, 4, 4))


def test_a_spread_that_float32_takes_for_zero_has_no_certificate():
    layer = nn.BatchNorm1d(2, eps=1e-50).eval()
    layer.running_var.zero_()
    assert not layer(torch.ones(1, 2)).isfinite().any()
    assert lipschitz_bound(layer).bound == pytest.approx(1e25)
    with pytest.raises(TypeError, match="nothing is known about its rounding"):
        og.certify(layer, torch.ones(1, 2), precision=torch.float32)
