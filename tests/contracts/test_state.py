"""Reading a weight for evaluation changes nothing; training state moves in training alone and can go stale safely."""

import copy
import io

import pytest
import torch
from torch import nn

from orthogonium.layers import OrthoLinear
from orthogonium.linalg import orthogonality_defect
from orthogonium.parametrizations import BatchedBjorckOrthogonalization, BatchedPowerIteration
from orthogonium.reparametrizers import PRESETS
from tests.helpers import constraint, contract, gaussian, random_matrix


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_changes_no_state_and_repeats_its_bits(preset):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    x = gaussian((5, 6), dtype=torch.float32)
    layer(x).sum().backward()
    layer.eval()
    before = snapshot(layer)
    outputs = [layer(x), layer(x)]
    with torch.no_grad():
        outputs.append(layer(x))
    outputs.append(layer.eval()(x))  # a switch of mode forgets the weight: computed afresh, the same bits
    with torch.inference_mode():
        outputs.append(layer(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])
    assert same(before, snapshot(layer))


@pytest.mark.parametrize("preset", PRESETS)
def test_training_and_evaluation_agree(preset):
    for shape in [(4, 4), (6, 3), (2, 3, 5)]:
        made = constraint(preset, shape, base_seed=1)
        free = gaussian(shape).requires_grad_()
        torch.testing.assert_close(made.train()(free), made.eval()(free), rtol=0, atol=0)


def scaled_before_orthogonalized(shape):
    """A pipeline whose normaliser does run: the orthogonaliser is told to depend on the scale."""
    orthogonalizer = BatchedBjorckOrthogonalization(shape)
    orthogonalizer.scale_invariant = False
    from orthogonium.parametrizations import Constraint

    return Constraint(BatchedPowerIteration(shape), orthogonalizer)


def test_power_iteration_moves_in_training_only():
    normalizer = BatchedPowerIteration((6, 4))
    matrix = gaussian((6, 4), dtype=torch.float32)
    start = normalizer.u.clone()
    normalizer.eval()(matrix)
    assert torch.equal(normalizer.u, start)
    normalizer.train()(matrix)
    assert not torch.equal(normalizer.u, start)


@pytest.mark.parametrize("stale", ["orthogonal direction", "zero", "nan", "huge"])
def test_stale_power_iteration_is_harmless(stale):
    made = scaled_before_orthogonalized((6, 4))
    free = gaussian((6, 4), dtype=torch.float32)
    left = torch.linalg.svd(free).U[:, -1]
    made.normalizer.u.copy_(
        {"orthogonal direction": left, "zero": 0 * left, "nan": left / 0, "huge": 1e30 * left}[stale]
    )
    for training in (False, True):
        weight = made.train(training)(free)
        assert orthogonality_defect(weight) <= contract(weight)
        assert made.normalizer.u.isfinite().all() or not training


def test_one_zero_weight_leaves_no_trace():
    made = scaled_before_orthogonalized((6, 4)).train()
    free = gaussian((6, 4), dtype=torch.float32)
    made(torch.zeros(6, 4))
    made(free)
    for _ in range(50):
        made.normalizer(free)
    sigma = torch.linalg.matrix_norm(free, ord=2)
    torch.testing.assert_close(made.normalizer(free), free / sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_hundred_large_steps(preset, optimizer):
    """Learning rates at which an unconstrained weight is lost after a few steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrthoLinear(6, 8, ortho_params=PRESETS[preset]),
        nn.Tanh(),
        OrthoLinear(8, 8, ortho_params=PRESETS[preset]),
    )
    x, target = gaussian((16, 6), dtype=torch.float32), gaussian((16, 8), dtype=torch.float32, seed=1)
    steps = {"sgd": lambda p: torch.optim.SGD(p, 10.0), "adam": lambda p: torch.optim.Adam(p, 1.0)}
    step = steps[optimizer](model.parameters())
    start = [model[i].weight.detach().clone() for i in (0, 2)]
    for _ in range(100):
        step.zero_grad()
        (model(x) - target).square().mean().backward()
        step.step()
    for training in (True, False):
        model.train(training)
        for layer, before in zip((model[0], model[2]), start, strict=True):
            weight = layer.weight.detach()
            assert orthogonality_defect(weight) <= contract(weight)
            assert not torch.allclose(weight, before, atol=1e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_deepcopy_and_state_dict(preset):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    layer(torch.ones(6)).sum().backward()
    layer.parametrizations.weight.original.data.add_(0.1)
    layer.train()  # the edit went around torch's version counter
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    twin.weight = random_matrix((4, 6), singular_values=(0.5, 2), dtype=torch.float32, seed=3)
    assert not torch.allclose(twin.weight, layer.weight)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = OrthoLinear(6, 4, ortho_params=PRESETS[preset])
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, layer.weight)
    assert same(snapshot(other), snapshot(layer))
