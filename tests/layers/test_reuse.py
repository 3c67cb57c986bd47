"""When a weight is computed: once per forward pass in training, once until a change in evaluation, and never stale."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from orthogonium.layers import OrthoLinear, UnitNormLinear
from orthogonium.linalg import orthogonality_defect
from orthogonium.parametrizations import BatchedPolarOrthogonalization
from orthogonium.reparametrizers import PRESETS, ClassParam, OrthoParams
from tests.helpers import contract, gaussian


class Counting(BatchedPolarOrthogonalization):
    calls = 0

    def orthogonalize(self, matrix):
        type(self).calls += 1
        return super().orthogonalize(matrix)


COUNTING = OrthoParams(PRESETS["polar"].spectral_normalizer, ClassParam(Counting))


@pytest.fixture
def layer():
    made = OrthoLinear(4, 4, ortho_params=COUNTING)
    with torch.no_grad():  # away from the weight that construction has computed
        made.parametrizations.weight.original.add_(gaussian((4, 4), dtype=torch.float32, seed=7))
    Counting.calls = 0
    return made


def free_of(layer):
    return layer.parametrizations.weight.original


def reference(layer, inputs, losses):
    """Gradients with the weight computed as an ordinary part of the graph."""
    leaf = free_of(layer).detach().clone().requires_grad_()
    weight = layer.parametrizations.weight[0].compute(leaf)
    for x, loss in zip(inputs, losses, strict=True):
        loss(x @ weight.mT + layer.bias.detach()).backward(retain_graph=True)
    return leaf.grad


X = gaussian((3, 4), dtype=torch.float32)


def test_evaluation_computes_once(layer):
    layer.eval()
    with torch.no_grad():
        for _ in range(5):
            layer(X)
    layer(X)
    layer(X)
    assert Counting.calls == 1


def test_evaluation_notices_every_change(layer):
    layer.eval()
    seen = [layer.weight.clone()]

    def changed():
        weight = layer.weight.clone()
        assert not any(torch.equal(weight, other) for other in seen)
        assert orthogonality_defect(weight) <= contract(weight)
        seen.append(weight)

    with torch.no_grad():
        free_of(layer).add_(gaussian((4, 4), dtype=torch.float32, seed=1))  # in place
    changed()
    layer.load_state_dict(OrthoLinear(4, 4).state_dict())
    changed()
    layer.weight = torch.linalg.qr(gaussian((4, 4), dtype=torch.float32, seed=2)).Q
    changed()
    free_of(layer).data = gaussian((4, 4), dtype=torch.float32, seed=3)  # another storage
    changed()
    layer.parametrizations.weight.original = nn.Parameter(gaussian((4, 4), dtype=torch.float32, seed=4))
    changed()
    layer.reset_parameters()
    changed()
    free_of(layer).data.add_(gaussian((4, 4), dtype=torch.float32, seed=5))  # unseen by torch, until the mode is set
    layer.eval()
    changed()


@pytest.mark.parametrize("gradients", [True, False])
def test_editing_a_weight_that_was_read_corrupts_nothing(layer, gradients):
    layer.eval()
    before = layer.weight.detach().clone()
    with torch.set_grad_enabled(gradients):
        read = layer.weight
        with torch.no_grad():
            read.zero_()
    assert torch.equal(layer.weight, before)


def test_editing_inside_inference_mode(layer):
    layer.eval()
    before = layer.weight.detach().clone()
    with torch.inference_mode():
        layer(X)
        layer.weight.zero_()
        assert torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)
    layer(X).sum().backward()  # nothing that inference mode made is left over
    assert free_of(layer).grad is not None


@pytest.mark.parametrize("calls", [2, 5])
def test_several_calls_in_one_forward_pass(layer, calls):
    inputs = [gaussian((3, 4), dtype=torch.float32, seed=seed) for seed in range(calls)]
    sum(layer(x).pow(2).sum() for x in inputs).backward()
    assert Counting.calls == 1
    expected = reference(layer, inputs, [lambda y: y.pow(2).sum()] * calls)
    torch.testing.assert_close(free_of(layer).grad, expected, rtol=1e-5, atol=1e-5)


def test_recurrent_use(layer):
    hidden = X
    for _ in range(4):
        hidden = torch.tanh(layer(hidden))
    hidden.sum().backward()
    assert Counting.calls == 1
    leaf = free_of(layer).detach().clone().requires_grad_()
    weight, hidden = layer.parametrizations.weight[0].compute(leaf), X
    for _ in range(4):
        hidden = torch.tanh(hidden @ weight.mT + layer.bias.detach())
    hidden.sum().backward()
    torch.testing.assert_close(free_of(layer).grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_two_losses_one_after_the_other(layer):
    y = layer(X)
    losses = [lambda y: y.pow(2).sum(), lambda y: y.exp().sum()]
    losses[0](y).backward(retain_graph=True)
    losses[1](y).backward()
    torch.testing.assert_close(free_of(layer).grad, reference(layer, [X, X], losses), rtol=1e-5, atol=1e-5)


def test_interleaved_forward_and_backward_passes(layer):
    """Two graphs on the same weight, backward in the wrong order."""
    inputs = [X, 2 * X]
    first, second = layer(inputs[0]).pow(2).sum(), layer(inputs[1]).exp().sum()
    second.backward()
    first.backward()
    expected = reference(layer, inputs, [lambda y: y.pow(2).sum(), lambda y: y.exp().sum()])
    torch.testing.assert_close(free_of(layer).grad, expected, rtol=1e-5, atol=1e-4)


def test_accumulating_gradients(layer):
    inputs = [gaussian((3, 4), dtype=torch.float32, seed=seed) for seed in range(3)]
    for x in inputs:
        layer(x).pow(2).sum().backward()
    expected = reference(layer, inputs, [lambda y: y.pow(2).sum()] * 3)
    torch.testing.assert_close(free_of(layer).grad, expected, rtol=1e-5, atol=1e-5)


def test_a_step_between_forward_and_backward_is_an_error(layer):
    loss = layer(X).pow(2).sum()
    with torch.no_grad():
        free_of(layer).add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place before the backward pass"):
        loss.backward()
    layer(X).pow(2).sum().backward()  # and the next one is fine
    assert free_of(layer).grad.isfinite().all()


def test_training_follows_every_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    weights = []
    for _ in range(5):
        optimizer.zero_grad()
        layer(X).pow(3).sum().backward()
        weights.append(layer.weight.detach().clone())
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))


def test_a_look_without_gradient_before_training(layer):
    """A read under ``no_grad`` in training mode must not leave the following forward pass without a gradient."""
    with torch.no_grad():
        before = layer.weight
    layer(X).pow(3).sum().backward()
    assert free_of(layer).grad.norm() > 0
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_activation_checkpointing(layer, reentrant, training):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Tanh(), OrthoLinear(4, 4), nn.Tanh(), UnitNormLinear(4, 2)).train(training)
    x = X.clone().requires_grad_()
    gradients = []
    for use in (False, True):
        model.zero_grad()
        for _ in range(2):
            y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
            y.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_checkpointing_a_part_that_shares_its_weight_with_the_rest(layer):
    x = X.clone().requires_grad_()
    gradients = []
    for use in (False, True):
        layer.zero_grad()
        hidden = torch.tanh(layer(x))
        hidden = checkpoint(layer, hidden, use_reentrant=False) if use else layer(hidden)
        layer(torch.tanh(hidden)).pow(2).sum().backward()
        gradients.append(free_of(layer).grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_inside_torchs_own_cache(layer):
    with parametrize.cached():
        layer(X).pow(2).sum().backward()
    expected = reference(layer, [X], [lambda y: y.pow(2).sum()])
    torch.testing.assert_close(free_of(layer).grad, expected, rtol=1e-5, atol=1e-5)
    with parametrize.cached():
        first = layer.weight
        assert layer.weight is first


@pytest.mark.parametrize("mode", ["forward only", "backward", "no_grad", "eval"])
def test_nothing_is_left_behind(layer, mode):
    """No step's weights or graphs survive it: neither in the module nor in reference cycles."""
    layer.train(mode != "eval")
    gc.collect()
    gc.disable()
    try:
        alive = []
        for step in range(50):
            with torch.set_grad_enabled(mode != "no_grad"):
                y = layer(X)
            evaluation = layer.parametrizations.weight[0]._evaluation[0]
            alive.append(weakref.ref(evaluation))
            if mode == "backward":
                y.pow(2).sum().backward()
            del y, evaluation
            with torch.no_grad():
                free_of(layer).add_(0.01 * step)
        assert sum(reference() is not None for reference in alive) <= 1
    finally:
        gc.enable()


def test_the_layer_itself_is_freed():
    layer = OrthoLinear(4, 4)
    layer(X).sum().backward()
    known = weakref.ref(layer.parametrizations.weight[0])
    gc.collect()
    gc.disable()
    try:
        del layer
        gc.enable()
        gc.collect()
        assert known() is None
    finally:
        gc.enable()


def test_switching_modes_back_and_forth(layer):
    for _ in range(3):
        layer.train()
        layer(X).pow(2).sum().backward()
        with torch.no_grad():
            free_of(layer).sub_(0.1 * free_of(layer).grad)
        trained = layer.weight.detach().clone()
        layer.eval()
        assert torch.equal(layer.weight, trained)


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_tensor_that_is_differentiated_is_never_remembered(layer, training):
    """``gradcheck`` moves its argument behind the version counter."""
    layer.double().train(training)
    name = "parametrizations.weight.original"
    x = X.double()
    assert torch.autograd.gradcheck(
        lambda free: torch.func.functional_call(layer, {name: free}, (x,)), free_of(layer).detach().requires_grad_()
    )
