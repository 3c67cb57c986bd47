"""Many gradients in one call, ``torch.autograd.grad(is_grads_batched=True)``, are the single ones."""

import pytest
import torch
from torch import nn

import orthogonium as og

SHAPES = [(5, 7), (7, 5), (6, 6), (130, 130), (4, 140)]  # below and above the side from which copies are made
CONVOLUTIONS = {
    "conv": lambda: og.OrthoConv2d(4, 4, 3),
    "stride": lambda: og.OrthoConv2d(4, 8, 3, stride=2),
    "groups": lambda: og.OrthoConv2d(4, 4, 3, groups=2),
    "1x1": lambda: og.OrthoConv2d(4, 4, 1),
    "transposed": lambda: og.OrthoConvTranspose2d(4, 4, 3),
}


def one_by_one(outputs, inputs, grads):
    found = [torch.autograd.grad(outputs, inputs, grad, retain_graph=True) for grad in grads]
    return [torch.stack(column) for column in zip(*found, strict=True)]


def compare(outputs, inputs):
    grads = torch.randn(3, *outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, retain_graph=True)
    for found, expected in zip(together, one_by_one(outputs, inputs, grads), strict=True):
        # sums in another order, times condition numbers below 1e3
        assert (found - expected).norm() <= 1e4 * torch.finfo(torch.float64).eps * expected.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", og.PRESETS)
def test_weights(preset, shape):
    torch.manual_seed(0)
    layer = og.OrthoLinear(*shape[::-1], bias=False, ortho_params=og.PRESETS[preset]).double()
    free = layer.parametrizations.weight.original
    for start in ("orthogonal", "gaussian"):
        (nn.init.orthogonal_ if start == "orthogonal" else nn.init.normal_)(free)
        compare(layer.weight, [free])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, for operators without a rule of their own
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[case]().double()
    free = [p for name, p in layer.named_parameters() if name != "bias"]
    compare(layer.weight, free)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    compare(layer(x), [x])


def test_a_free_tensor_filled_through_data_after_construction():
    layer = og.OrthoLinear(6, 6, bias=False)
    free = layer.parametrizations.weight.original
    free.data.normal_()
    weight = layer.weight.detach().clone()
    assert torch.equal(layer.train(False).weight, weight)
