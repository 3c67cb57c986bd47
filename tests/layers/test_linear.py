"""OrthoLinear and UnitNormLinear: a torch layer in every respect, with a constrained weight."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from orthogonium.layers import OrthoLinear, UnitNormLinear, orthogonal
from orthogonium.linalg import orthogonality_defect
from orthogonium.reparametrizers import PRESETS
from tests.helpers import contract, gaussian, orthogonal_matrix, polar_reference, random_matrix

LAYERS = [OrthoLinear, UnitNormLinear]


@pytest.mark.parametrize("layer_class", LAYERS)
def test_arguments_are_those_of_torch(layer_class):
    torchs = list(inspect.signature(nn.Linear).parameters)
    ours = list(inspect.signature(layer_class).parameters)
    assert [name for name in ours if name != "ortho_params"] == torchs
    assert ours[:3] == torchs[:3]
    layer = layer_class(3, 2, False, dtype=torch.float64)
    assert (layer.in_features, layer.out_features, layer.bias) == (3, 2, None)
    assert layer.weight.dtype == torch.float64
    assert isinstance(layer, nn.Linear)
    assert "in_features=3, out_features=2, bias=False" in repr(layer)


def test_what_the_representation_tells():
    text = repr(OrthoLinear(3, 2, ortho_params=PRESETS["bjorck_pass_through"]))
    assert "OrthoLinear" in text
    assert "BatchedBjorckOrthogonalization((2, 3), beta=0.5, niters=12, pass_through=True)" in text
    assert "niters=7" in repr(OrthoLinear(3, 2, ortho_params=PRESETS["exp"]))
    assert "stable=True" in repr(OrthoLinear(3, 2, ortho_params=PRESETS["cholesky_stable"]))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_operator_norm(layer_class):
    for out_features, in_features in [(1, 1), (4, 4), (3, 7), (7, 3)]:
        layer = layer_class(in_features, out_features, dtype=torch.float64)
        operator = (layer(torch.eye(in_features, dtype=torch.float64)) - layer.bias).mT  # impulse responses
        if layer_class is OrthoLinear:
            assert orthogonality_defect(operator.detach()) <= 2 * contract(operator)
        else:
            assert (operator.norm(dim=1) - 1).abs().max() <= 4 * torch.finfo(torch.float64).eps


def test_initial_weights_are_uniformly_distributed():
    """Haar: entries of a 2×2 orthogonal matrix have the arcsine law, of variance 1/2, and both determinants occur."""
    torch.manual_seed(0)
    weights = torch.stack([OrthoLinear(2, 2, bias=False).weight.detach() for _ in range(400)])
    assert weights.mean(0).abs().max() < 4 * (0.5 / 400) ** 0.5
    assert (weights.square().mean(0) - 0.5).abs().max() < 4 * (0.125 / 400) ** 0.5
    assert 140 < (torch.linalg.det(weights) > 0).sum() < 260


@pytest.mark.parametrize("layer_class", LAYERS)
def test_seeds_and_reset(layer_class):
    torch.manual_seed(1)
    first = layer_class(5, 3)
    torch.manual_seed(1)
    second = layer_class(5, 3)
    assert torch.equal(first.weight, second.weight)
    second.reset_parameters()
    assert not torch.equal(first.weight, second.weight)
    assert not torch.equal(first.bias, second.bias)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_bad_sizes_and_dtypes(layer_class):
    for sizes in [(-1, 2), (2, -1)]:
        with pytest.raises(ValueError, match=r"(in|out)_features must not be negative, got -1"):
            layer_class(*sizes)
    with pytest.raises(TypeError, match=r"in_features must be an integer, got 2\.0"):
        layer_class(2.0, 2)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="real floating point"):
            layer_class(2, 2, dtype=dtype)
    with pytest.raises(TypeError, match="ortho_params must be an OrthoParams such as"):
        OrthoLinear(2, 2, ortho_params="cholesky")


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_layers_and_batches(layer_class, sizes):
    layer, plain = layer_class(*sizes), nn.Linear(*sizes)
    assert layer(torch.ones(2, sizes[0])).shape == plain(torch.ones(2, sizes[0])).shape
    full = layer_class(3, 2)
    y = full(torch.ones(0, 3))
    assert y.shape == (0, 2)
    y.sum().backward()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plain_checkpoint_is_projected(preset):
    plain = nn.Linear(6, 4)
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    layer(torch.ones(6))
    assert not any(layer.load_state_dict(plain.state_dict()))
    nearest = polar_reference(plain.weight.detach())
    torch.testing.assert_close(layer.weight.detach().double(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(layer.bias, plain.bias)
    nested = nn.Sequential(nn.Tanh(), nn.Sequential(layer))
    reference = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(6, 4)))
    nested.load_state_dict(reference.state_dict())
    nearest = polar_reference(reference[1][0].weight.detach())
    torch.testing.assert_close(layer.weight.detach().double(), nearest, rtol=0, atol=1e-6)


def test_a_plain_checkpoint_for_unit_rows():
    plain, layer = nn.Linear(6, 4), UnitNormLinear(6, 4)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer.weight, plain.weight / plain.weight.norm(dim=1, keepdim=True))


def test_wrong_checkpoints_are_refused():
    layer = OrthoLinear(6, 4).eval()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"(size mismatch|unexpected key|Unexpected key|Missing key)"):
        layer.load_state_dict(nn.Linear(5, 4).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(OrthoLinear(5, 4, ortho_params=PRESETS["exp"]).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    bad = nn.Linear(6, 4).state_dict()
    bad["weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"OrthoLinear\.weight .*NaN"):
        layer.load_state_dict(bad)
    assert torch.equal(layer.eval().weight, before)


def test_a_checkpoint_of_a_later_format_is_refused():
    state = OrthoLinear(3, 3).state_dict()
    state["parametrizations.weight.0._extra_state"] = torch.tensor(901.0)
    with pytest.raises(ValueError, match="format 9; this version of orthogonium reads format 1"):
        OrthoLinear(3, 3).load_state_dict(state)


@pytest.mark.parametrize("target", PRESETS)
@pytest.mark.parametrize("source", PRESETS)
def test_presets_load_each_other_and_keep_the_weight(source, target):
    for out_features, in_features in [(4, 4), (3, 5), (5, 3)]:
        first = OrthoLinear(in_features, out_features, ortho_params=PRESETS[source])
        with torch.no_grad():  # away from the weight that a fresh free tensor equals
            first.parametrizations.weight.original.add_(gaussian((out_features, in_features), dtype=torch.float32))
        second = OrthoLinear(in_features, out_features, ortho_params=PRESETS[target])
        second.load_state_dict(first.state_dict())
        torch.testing.assert_close(second.weight, first.weight, rtol=0, atol=4 * contract(first.weight))
        assert second.state_dict().keys() == OrthoLinear(2, 2, ortho_params=PRESETS[target]).state_dict().keys()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_pickle(preset, training):
    def make():
        return UnitNormLinear(6, 4) if preset is None else OrthoLinear(6, 4, ortho_params=PRESETS[preset])

    model = nn.Sequential(make(), nn.Tanh()).double().train(training)
    model[0].bias.requires_grad_(False)
    model(gaussian((2, 6))).sum().backward()
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for twin in copies:
        assert type(twin[0]).__mro__[1] is type(model[0]).__mro__[1]
        assert torch.equal(twin[0].weight, model[0].weight)
        assert twin.training == training
        assert not twin[0].bias.requires_grad
        assert twin[0].parametrizations.weight.original.requires_grad
        twin[0].weight = orthogonal_matrix((4, 6), seed=3)
        assert not torch.allclose(twin[0].weight, model[0].weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_removal_leaves_the_weight(preset):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    x, before = gaussian((2, 6), dtype=torch.float32), layer.weight.detach().clone()
    y = layer(x)
    remove_parametrizations(layer, "weight")
    assert not is_parametrized(layer)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) in (["weight", "bias"], ["bias", "weight"])
    nn.Linear(6, 4).load_state_dict(layer.state_dict())
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)


def test_tied_weights():
    first, second = OrthoLinear(4, 4), OrthoLinear(4, 4)
    second.parametrizations.weight.original = first.parametrizations.weight.original
    model = nn.Sequential(first, nn.Tanh(), second)
    assert len(list(model.parameters())) == 3
    x = gaussian((3, 4), dtype=torch.float32)
    model(x).sum().backward()
    found = first.parametrizations.weight.original.grad.clone()
    leaf = first.parametrizations.weight.original.detach().clone().requires_grad_()
    weight = first.parametrizations.weight[0].compute(leaf)
    hidden = torch.tanh(x @ weight.mT + first.bias.detach())
    (hidden @ weight.mT + second.bias.detach()).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-6)


def test_frozen_weights():
    layer = OrthoLinear(4, 4)
    layer.parametrizations.weight.original.requires_grad_(False)
    x = gaussian((3, 4), dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None
    layer.parametrizations.weight.original.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_lazy_modules_are_refused_until_they_have_a_shape():
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"LazyLinear\.weight has no shape yet\. Run one forward pass"):
        orthogonal(lazy)
    lazy(torch.ones(2, 5))
    orthogonal(lazy)
    assert orthogonality_defect(lazy.weight.detach()) <= contract(lazy.weight)


def test_what_cannot_be_constrained():
    with pytest.raises(ValueError, match="parametrized already"):
        orthogonal(OrthoLinear(3, 3))
    with pytest.raises(ValueError, match="Tanh has no parameter 'weight'; it has: none"):
        orthogonal(nn.Tanh())
    with pytest.raises(ValueError, match="it has: weight, bias"):
        orthogonal(nn.Linear(3, 3), "wieght")
    with pytest.raises(ValueError, match=r"Bilinear\.weight must be a matrix or the kernel"):
        orthogonal(nn.Bilinear(2, 2, 3))
    with pytest.raises(ValueError, match=r"Linear\.bias must have shape"):
        orthogonal(nn.Linear(3, 3), "bias")
    with pytest.raises(TypeError, match=r"Linear\.weight must be a real floating-point tensor"):
        orthogonal(nn.Linear(3, 3, dtype=torch.complex64))
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(ValueError, match=r"Linear\.weight .*NaN"):
        orthogonal(broken)
    assert not is_parametrized(broken)


def test_constraining_other_modules():
    cell = orthogonal(nn.RNNCell(3, 4), "weight_hh")
    assert orthogonality_defect(cell.weight_hh.detach()) <= contract(cell.weight_hh)
    cell(torch.ones(2, 3)).sum().backward()
    plain = nn.Linear(3, 5)
    nearest = polar_reference(plain.weight.detach())
    torch.testing.assert_close(orthogonal(plain).weight.double(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_threads_get_the_same_weight(training):
    layer = OrthoLinear(32, 32).train(training)
    x = gaussian((4, 32), dtype=torch.float32)
    expected = layer(x).detach().clone()
    layer.train(training)
    results, errors = [], []

    def work():
        try:
            for _ in range(20):
                with torch.no_grad():
                    results.append(layer(x).clone())
        except Exception as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(result, expected) for result in results)


def test_a_singular_start_trains():
    layer = OrthoLinear(5, 3)
    with torch.no_grad():
        start = random_matrix((3, 5), singular_values=(0.0, 1.0), dtype=torch.float32, seed=0)
        layer.parametrizations.weight.original.copy_(start)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    target = orthogonal_matrix((3, 5), dtype=torch.float32, seed=4)
    for _ in range(200):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), target, rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("preset", ["default", "exp"])
def test_a_checkpoint_with_nan_changes_nothing(preset, value):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    for source in (OrthoLinear(6, 4, ortho_params=PRESETS[preset]), nn.Linear(6, 4)):
        state = source.state_dict()
        key = "weight" if "weight" in state else "parametrizations.weight.original"
        state[key][0, 0] = value
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match=rf"NaN or Inf in 1 of 24 entries of {key}"):
            layer.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_small_file_cannot_ask_for_much_memory():
    """A tensor of one number, expanded to 100,000 x 100,000, is refused by its shape: 10 GB to look at its entries."""
    layer = OrthoLinear(3, 3)
    state = layer.state_dict() | {"parametrizations.weight.original": torch.full((1,), torch.nan).expand(10**5, 10**5)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
