"""Bounds on the operator of every linear and convolution layer, of torch and of this library."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import orthogonium as og
from orthogonium import layers
from orthogonium.certification import absolute_norm_bound, operator_norm_bound
from orthogonium.certification._orthogonal_norm import orthogonal_kernel_bound
from tests.helpers import gaussian
from tests.operators import explicit

SIDES = {1: (12,), 2: (6, 8), 3: (4, 4, 2)}


def matrix_of(layer, shape):
    """The linear part, in float64, from the layer's own forward."""
    layer = layer.double().eval()
    with torch.no_grad():
        zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
        impulses = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        return (layer(impulses) - zero).flatten(1).T


def plain(cls, *arguments, **keywords):
    torch.manual_seed(0)
    return cls(*arguments, **keywords)


CASES = {
    "Linear": lambda: (plain(nn.Linear, 7, 5), (7,)),
    "OrthoLinear": lambda: (plain(og.OrthoLinear, 5, 7), (5,)),
    "UnitNormLinear": lambda: (plain(og.UnitNormLinear, 5, 7), (5,)),
    "spectral_norm": lambda: (parametrizations.spectral_norm(plain(nn.Linear, 7, 5)), (7,)),
    "Conv2d valid": lambda: (plain(nn.Conv2d, 3, 4, 3, padding="valid"), (3, 6, 8)),
    "Conv2d same even": lambda: (plain(nn.Conv2d, 3, 4, (2, 4), padding="same"), (3, 6, 8)),
    "Conv2d strided": lambda: (plain(nn.Conv2d, 4, 6, 3, stride=(2, 3), padding=1, groups=2), (4, 6, 8)),
    "Conv2d dilated": lambda: (plain(nn.Conv2d, 4, 6, 3, dilation=2, stride=2, padding=2), (4, 6, 8)),
    "ConvTranspose2d": lambda: (
        plain(nn.ConvTranspose2d, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        (4, 3, 4),
    ),
}


def case(cls, shape, *arguments, **keywords):
    return lambda: (plain(cls, *arguments, **keywords), shape)


for dims, sides in SIDES.items():
    half = tuple(n // 2 for n in sides)
    for mode in ("zeros", "circular", "reflect", "replicate"):
        keywords = {"padding": 1, "padding_mode": mode}
        CASES[f"Conv{dims}d {mode}"] = case(getattr(nn, f"Conv{dims}d"), (2, *sides), 2, 3, 3, **keywords)
    for mode, stride, family in product(("zeros", "circular"), (1, 2), ("Ortho", "AOL")):
        keywords = {"stride": stride, "padding_mode": mode}
        conv, back = getattr(layers, f"{family}Conv{dims}d"), getattr(layers, f"{family}ConvTranspose{dims}d")
        CASES[f"{family}Conv{dims}d {mode} {stride}"] = case(conv, (2, *sides), 2, 4, 3, **keywords)
        CASES[f"{family}ConvTranspose{dims}d {mode} {stride}"] = case(back, (4, *half), 4, 2, 3, **keywords)
    for mode in ("zeros", "circular"):
        skew = getattr(layers, f"SkewOrthoConv{dims}d")
        CASES[f"SkewOrthoConv{dims}d {mode}"] = case(skew, (2, *sides), 2, 2, 3, padding_mode=mode)
CASES["SkewOrthoConv2d wider"] = lambda: (plain(layers.SkewOrthoConv2d, 2, 4, 3, groups=2), (2, 6, 8))
CASES["OrthoConvTranspose2d filled"] = lambda: (plain(og.OrthoConvTranspose2d, 8, 4, 2, stride=3), (8, 2, 3))


@pytest.mark.parametrize("name", CASES)
def test_never_below_the_layer_and_close_to_it(name):
    layer, shape = CASES[name]()
    matrix = matrix_of(layer, shape)
    truth = float(torch.linalg.matrix_norm(matrix, ord=2)) * (1 - 1e-12)
    bound = operator_norm_bound(layer, shape)
    assert truth <= bound <= truth * (1 + 1e-4)
    assert bound == operator_norm_bound(layer, (5, *shape))  # a batch in front does not matter
    anywhere = operator_norm_bound(layer)
    assert bound <= anywhere * (1 + 1e-4)
    absolute = float(torch.linalg.matrix_norm(matrix.abs(), ord=2)) * (1 - 1e-12)
    assert absolute <= absolute_norm_bound(layer, shape)
    assert absolute <= absolute_norm_bound(layer)
    if name.startswith(("Ortho", "Skew")):
        assert bound <= 1 + 1e-6
        assert anywhere <= 1 + 1e-5


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("arguments", "keywords", "sides"),
    [
        ((4, 8, 3), {"stride": 2}, [(7, 6), (6, 7), (11, 9)]),
        ((8, 4, 5), {"stride": 3}, [(16, 10), (9, 9), (13, 14)]),
        ((6, 4, (1, 3)), {"stride": (2, 1), "groups": 2}, [(7, 5), (8, 3)]),
        ((4, 4, 3), {"dilation": 2}, [(5, 6), (9, 9)]),
        ((9, 9, 2), {"stride": 3, "groups": 3}, [(9, 9), (12, 6)]),
        ((3, 3, 3), {"groups": 3}, [(5, 5)]),
    ],
)
def test_orthogonal_layers_on_every_image_that_they_accept(arguments, keywords, sides, mode):
    for make, flip in ((og.OrthoConv2d, False), (og.OrthoConvTranspose2d, True)):
        inner, outer, size = arguments
        layer = plain(make, *((outer, inner) if flip else (inner, outer)), size, padding_mode=mode, **keywords)
        bound = operator_norm_bound(layer)
        assert bound <= 1 + 1e-5
        tried = 0
        for shape in sides:
            try:
                matrix = matrix_of(layer, (layer.in_channels, *shape))
            except ValueError:  # refused
                continue
            tried += 1
            assert float(torch.linalg.matrix_norm(matrix, ord=2)) * (1 - 1e-12) <= bound
        assert tried


def test_a_kernel_that_no_factors_made_is_bounded_too():
    layer = plain(og.OrthoConv2d, 3, 5, 3, stride=2)
    kernel = gaussian((5, 3, 3, 3))
    matrix = explicit(kernel, (6, 8), (2, 2), (1, 1), layer.geometry.pads, True, 1)
    truth = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert truth <= orthogonal_kernel_bound(kernel, (2, 2), 1)
    rounded = layer.weight.detach() * 1.001
    matrix = explicit(rounded, (6, 8), (2, 2), (1, 1), layer.geometry.pads, True, 1)
    truth = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert 1.0009 < truth * (1 - 1e-13) <= orthogonal_kernel_bound(rounded, (2, 2), 1) <= truth * (1 + 1e-5)


def test_float32_weights_are_bounded_as_they_are():
    layer = plain(og.OrthoLinear, 30, 40).eval()
    weight = layer.weight.detach().double()
    truth = float(torch.linalg.svdvals(weight)[0])
    assert truth * (1 - 1e-13) <= operator_norm_bound(layer) <= truth * (1 + 1e-8)


def test_a_skew_layer_whose_weight_is_no_longer_skew():
    layer = plain(layers.SkewOrthoConv1d, 3, 3, 3, dtype=torch.float64)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    with torch.no_grad():
        layer.weight.copy_(gaussian(layer.weight.shape, seed=0))
    matrix = matrix_of(layer, (3, 9))
    truth = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert 1.5 < truth <= operator_norm_bound(layer, (3, 9))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="got Doubled, which has a forward of its own"):
        operator_norm_bound(Doubled(2, 2))
    with pytest.raises(TypeError, match="got ReLU, which is no linear or convolution layer"):
        operator_norm_bound(nn.ReLU())
    with pytest.raises(TypeError, match="complex"):
        operator_norm_bound(nn.Linear(2, 2, dtype=torch.complex64))
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        operator_norm_bound(broken)
    with pytest.raises(ValueError, match=r"input_shape must be \(\.\.\., 3, 2 sides\), got \(4, 8, 8\)"):
        operator_norm_bound(nn.Conv2d(3, 4, 3), (4, 8, 8))
    with pytest.raises(ValueError, match=r"input_shape must be \(\.\.\., 3\), got \(4,\)"):
        operator_norm_bound(nn.Linear(3, 4), (4,))
    with pytest.raises(ValueError, match="has no values yet"):
        operator_norm_bound(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="has no values yet"):
        operator_norm_bound(nn.Linear(3, 3, device="meta"))
