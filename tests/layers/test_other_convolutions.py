"""Almost-orthogonal and skew-exponential convolutions: their bounds, from any raw tensor, and their life cycle."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.parametrize import remove_parametrizations
from torch.testing import assert_close

from orthogonium import layers
from tests.operators import allowance, materialise, spectrum

AOL = {
    "stride 1": ("AOLConv2d", (3, 5, 3), {}, (5, 6)),
    "fewer outputs": ("AOLConv2d", (5, 3, (2, 3)), {"padding_mode": "zeros"}, (5, 4)),
    "stride and groups": ("AOLConv2d", (4, 8, 3), {"stride": 2, "groups": 2}, (6, 6)),
    "one dimension, dilation": ("AOLConv1d", (3, 4, 3), {"dilation": 2}, (7,)),
    "three dimensions": ("AOLConv3d", (2, 2, 3), {}, (3, 3, 3)),
    "transposed": ("AOLConvTranspose2d", (6, 4, 3), {"stride": 2}, (3, 3)),
    "transposed zeros": ("AOLConvTranspose1d", (4, 4, 5), {"padding_mode": "zeros", "padding": 2}, (6,)),
    "transposed 3d": ("AOLConvTranspose3d", (2, 3, 2), {}, (3, 2, 3)),
}
SKEW = {
    "square": ("SkewOrthoConv2d", (4, 4, 3), {}, (5, 6)),
    "zeros": ("SkewOrthoConv2d", (4, 4, (3, 5)), {"padding_mode": "zeros"}, (4, 5)),
    "depthwise": ("SkewOrthoConv2d", (5, 5, 3), {"groups": 5}, (5, 5)),
    "more outputs": ("SkewOrthoConv1d", (4, 8, 3), {"groups": 2, "dilation": 2}, (7,)),
    "fewer outputs": ("SkewOrthoConv3d", (4, 2, 3), {}, (3, 3, 3)),
    "larger angle": ("SkewOrthoConv1d", (3, 3, 3), {"angle": 6.0}, (9,)),
}


def raw_states(layer):
    yield "at the start"
    (free,) = layer.parametrizations.weight.parameters()
    for scale in (1e-3, 1.0, 1e3):
        with torch.no_grad():
            free.normal_().mul_(scale)
        yield f"noise of scale {scale}"


def skew_operator(layer, sides):
    shape = (layer.in_channels, *sides)
    impulses = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        layer(impulses[:1].to(layer.weight.dtype))
        return layer._turned(impulses, layer.weight.double(), None).flatten(1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", AOL)
def test_almost_orthogonal_never_expands(case, dtype):
    name, sizes, keywords, sides = AOL[case]
    torch.manual_seed(0)
    layer = getattr(layers, name)(*sizes, **keywords, dtype=dtype)
    for state in raw_states(layer):
        matrix = materialise(layer, sides)
        largest = spectrum(matrix)[-1]
        assert largest <= 1 + allowance(matrix, dtype, layer.groups), state
        assert largest > 0.3, state


@pytest.mark.parametrize("case", AOL)
def test_almost_orthogonal_weights_can_be_assigned(case):
    name, sizes, keywords, _ = AOL[case]
    torch.manual_seed(0)
    layer, other = (getattr(layers, name)(*sizes, **keywords, dtype=torch.float64) for _ in range(2))
    layer.weight = other.weight.detach()
    assert_close(layer.weight, other.weight, rtol=0, atol=1e-10)  # the Perron vector's iteration
    layer.weight = 7 * other.weight.detach()
    assert_close(layer.weight, other.weight, rtol=0, atol=1e-10)


def test_almost_orthogonal_keeps_an_orthogonal_kernel():
    layer = layers.AOLConv2d(4, 4, 3, dtype=torch.float64)
    layer.weight = layers.OrthoConv2d(4, 4, 3, dtype=torch.float64).weight.detach()
    values = spectrum(materialise(layer, (5, 5)))
    assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SKEW)
def test_the_exponential_of_a_skew_kernel_is_orthogonal(case, dtype):
    name, sizes, keywords, sides = SKEW[case]
    torch.manual_seed(0)
    layer = getattr(layers, name)(*sizes, **keywords, dtype=dtype)
    for state in raw_states(layer):
        matrix = skew_operator(layer, sides)
        values, slack = spectrum(matrix), allowance(matrix, dtype, layer.groups)
        assert values[-1] <= 1 + slack, state
        assert values[0] >= 1 - slack, state


def test_skew_kernels_turn_depthwise_layers():
    torch.manual_seed(0)
    layer = layers.SkewOrthoConv2d(3, 3, 3, groups=3)
    matrix = skew_operator(layer, (4, 4))
    assert (matrix.abs() > 1e-3).sum(1).min() > 3  # more than a signed shift
    layer(torch.randn(1, 3, 4, 4)).square().mul(torch.randn(1, 3, 4, 4)).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0


def test_a_skew_kernel_within_the_bound_comes_back():
    layer = layers.SkewOrthoConv2d(3, 3, 3, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    layer.weight = weight
    assert_close(layer.weight, weight)


@pytest.mark.parametrize("case", [*list(AOL.values())[:1], AOL["transposed"], *list(SKEW.values())[:2]], ids=str)
def test_life_cycle(case):
    name, sizes, keywords, sides = case
    layer = getattr(layers, name)(*sizes, **keywords)
    x = torch.randn(2, sizes[0], *sides)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert_close(copy.deepcopy(layer).double()(x.double()).float(), y, rtol=0, atol=5e-5)
    assert torch.equal(layer.eval()(x), y)
    remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        layers.SkewOrthoConv2d(4, 4, 2)
    with pytest.raises(ValueError, match="angle must be positive"):
        layers.SkewOrthoConv2d(4, 4, 3, angle=0.0)
    with pytest.raises(ValueError, match="finite, got inf"):  # a series of which no term would be the last
        layers.SkewOrthoConv2d(4, 4, 3, angle=float("inf"))
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        layers.AOLConv2d(4, 4, 3, padding_mode="reflect")


def test_a_skew_kernel_starts_at_the_identity():
    layer = layers.SkewOrthoConv1d(2, 2, 3, bias=False).double()
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    layer.weight = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    name = "parametrizations.weight.original"
    zero = torch.zeros(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda free: torch.func.functional_call(layer, {name: free}, (x,)), zero)


@pytest.mark.parametrize("make", [layers.SkewOrthoConv2d, layers.AOLConv2d])
def test_a_kernel_that_is_not_finite_is_named(make):
    layer = make(2, 2, 3)
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"{make.__name__}\.weight .* NaN or Inf in 1 of 36"):
        layer(torch.ones(1, 2, 4, 4))
