"""The life of an orthogonal convolution: values, adjoints, checkpoints, copies, compilers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrize import remove_parametrizations
from torch.testing import assert_close

import orthogonium as og
from orthogonium import layers
from orthogonium.reparametrizers import PRESETS
from tests.operators import explicit, materialise

LAYERS = {
    "stride 1": lambda **k: og.OrthoConv2d(4, 8, 3, **k),
    "stride 2": lambda **k: og.OrthoConv2d(4, 8, 3, stride=2, **k),
    "groups": lambda **k: og.OrthoConv2d(4, 6, (2, 3), groups=2, padding_mode="zeros", **k),
    "transposed": lambda **k: og.OrthoConvTranspose2d(4, 8, 3, stride=2, **k),
    "kernel equals stride": lambda **k: og.OrthoConv2d(4, 8, 2, stride=2, **k),
}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LAYERS)
def make(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


def rounding(layer):
    return 64 * torch.finfo(layer.weight.dtype).eps


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_operator_is_the_definition(dims, mode, padding):
    torch.manual_seed(0)
    sides = (6, 4, 4)[:dims]
    layer = getattr(layers, f"OrthoConv{dims}d")(
        2, 4, (4, 3, 3)[:dims], stride=(2, 1, 1)[:dims], padding=padding, padding_mode=mode, groups=2
    )
    g = layer.geometry
    reference = explicit(layer.weight, sides, g.stride, g.dilation, g.pads, mode == "circular", 2)
    assert_close(materialise(layer, sides), reference, rtol=0, atol=1e-14)
    x = torch.randn(1, 2, *sides)
    assert_close(
        layer(x).flatten(),
        (reference.float() @ x.flatten()) + layer.bias.repeat_interleave(layer(x)[0, 0].numel()),
        rtol=0,
        atol=rounding(layer),
    )


@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize(
    ("k", "s", "d", "padding"),
    [
        (3, 1, 1, "same"),
        (4, 1, 1, "same"),
        (3, 2, 1, "same"),
        (3, 2, 1, "valid"),
        (2, 3, 1, "same"),
        (4, 3, 2, "same"),
    ],
)
def test_transposed_is_the_adjoint(k, s, d, padding, mode):
    torch.manual_seed(0)
    transposed = og.OrthoConvTranspose2d(6, 4, k, stride=s, dilation=d, padding=padding, padding_mode=mode, bias=False)
    there = og.OrthoConv2d(4, 6, k, stride=s, dilation=d, padding=padding, padding_mode=mode, bias=False)
    there.weight = transposed.weight.detach()
    windows = (3, 4)
    sides = transposed(torch.zeros(1, 6, *windows)).shape[2:]
    if padding == "same":
        assert tuple(sides) == tuple(n * s for n in windows)
    assert_close(materialise(transposed, windows), materialise(there, tuple(sides)).T, rtol=0, atol=rounding(there))


def test_output_size_chooses_among_the_sides():
    layer = og.OrthoConvTranspose2d(8, 4, 3, stride=2, padding=1, padding_mode="zeros")
    x = torch.randn(2, 8, 4, 4)
    assert layer(x).shape[2:] == (7, 7)
    assert layer(x, output_size=(8, 7)).shape[2:] == (8, 7)
    with pytest.raises(ValueError, match=r"sides of 7 to 8 can"):
        layer(x, output_size=(9, 9))


def test_a_transposed_layer_refuses_overlapping_windows():
    layer = og.OrthoConvTranspose2d(8, 4, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="output_padding=1"):
        layer(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_assigning_an_orthogonal_kernel_gives_it_back(make, name):
    layer, other = make(ortho_params=PRESETS[name]), make()
    weight = other.weight.detach().clone()
    layer.weight = weight
    assert_close(
        layer.weight, weight, rtol=0, atol=1e-4 if layer.weight.shape[0] < 4 else 1e-5
    )  # conditioning of the frames


def test_assigning_any_kernel_gives_an_orthogonal_one(make):
    layer = make()
    layer.weight = torch.randn_like(layer.weight)
    first = layer.weight.detach().clone()
    matrix = materialise(layer, (6, 6))
    assert torch.linalg.matrix_norm(matrix, ord=2) <= 1 + 1e-5
    layer.weight = first
    assert_close(layer.weight, first, rtol=0, atol=1e-5)


def test_copies_and_checkpoints_compute_the_same(make):
    layer = make()
    y = layer(X)
    assert torch.equal(copy.deepcopy(layer)(X), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(X), y)
    fresh = make()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(X), y)
    bare = pickle.loads(pickle.dumps(layer))
    remove_parametrizations(bare, "weight")
    assert torch.equal(bare(X), y)


@pytest.mark.parametrize("name", PRESETS)
def test_checkpoints_of_every_preset_load_into_every_layer(make, name):
    source, layer = make(ortho_params=PRESETS[name]), make()
    layer.load_state_dict(source.state_dict())
    assert_close(layer(X), source(X), rtol=0, atol=rounding(layer))


def test_a_plain_checkpoint_loads(make):
    source, layer = make(), make()
    state = {"weight": source.weight.detach(), "bias": source.bias.detach()}
    layer.load_state_dict(state)
    assert_close(layer(X), source(X), rtol=0, atol=1e-5)  # through the frames, found from the kernel


def test_compile_export_and_functional_call(make):
    layer = make()
    y = layer(X)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), y)
    reference = torch.autograd.grad(layer(X).sin().sum(), list(layer.parameters()))
    assert_close(torch.autograd.grad(compiled(X).sin().sum(), list(layer.parameters())), reference)
    assert_close(torch.export.export(layer.eval(), (X,)).module()(X), y)
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert_close(functional_call(layer, state, (X,)), y)
    gradient = torch.func.grad(lambda s: functional_call(layer, s, (X,)).sin().sum())(dict(layer.named_parameters()))
    assert_close(list(gradient.values()), list(reference), rtol=1e-4, atol=1e-4)


def test_other_precisions(make):
    layer = make()
    y = layer(X)
    assert_close(copy.deepcopy(layer).double()(X.double()).float(), y, rtol=0, atol=rounding(layer))
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert_close(half(X.bfloat16()).float(), y, rtol=0, atol=16 * torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, pickle.loads(pickle.dumps(layer)).weight)


def test_weight_is_computed_once_in_evaluation_mode(make):
    layer = make().eval()
    assert layer.weight.data_ptr() == layer.weight.data_ptr()
    with torch.no_grad():
        next(layer.parametrizations.weight.parameters()).add_(1.0)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        next(layer.parametrizations.weight.parameters()).normal_()
    assert not torch.equal(layer.weight, before)


def test_every_free_tensor_learns(make):
    layer = make()
    loss = layer(X).sin().sum()
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_derivatives_through_the_layer():
    layer = og.OrthoConv2d(2, 3, 2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = layer.parametrizations.weight
    free = [weight.original0, weight.original1]
    run = lambda x, *free: layer._conv_forward(x, weight[0].compute(*free), None)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *free))
    assert torch.autograd.gradgradcheck(run, (x, *free))


def test_reset_parameters_draws_anew(make):
    layer = make()
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert (layer.weight - before).abs().max() > 0.05


def test_torch_subclasses_with_torch_kernels():
    layer = og.AdaptiveOrthoConv2d(6, 4, (3, 2), stride=(2, 1), groups=2)
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.shape == (4, 3, 3, 2)
    up = og.AdaptiveOrthoConvTranspose2d(6, 4, 3, groups=2)
    assert isinstance(up, nn.ConvTranspose2d)
    assert up.weight.shape == (6, 2, 3, 3)
    assert og.OrthoConv2d(4, 4, 3, device="meta").weight.is_meta
    assert "kernel_size=(3, 2)" in repr(layer)


def test_nan_is_reported_with_the_name_of_the_weight():
    layer = og.OrthoConv2d(4, 4, 3)
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"OrthoConv2d\.weight .*NaN"):
        layer(X)


@pytest.mark.parametrize("kind", ["OrthoConv2d", "OrthoConvTranspose2d"])
def test_compiled_layers_take_images_of_changing_sides(kind):
    layer = getattr(og, kind)(4, 4, 3, stride=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for side in (6, 8, 10):
        x = torch.randn(1, 4, side, side)
        assert_close(compiled(x), layer(x))
