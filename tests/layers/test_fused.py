"""``fused``: one batched orthogonalisation per group, the same values and gradients."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from orthogonium.layers import OrthoLinear, UnitNormLinear, fused
from orthogonium.parametrizations import BatchedPolarOrthogonalization, orthogonalizers
from orthogonium.reparametrizers import PRESETS, ClassParam, OrthoParams
from tests.helpers import gaussian


class Counting(BatchedPolarOrthogonalization):
    calls = 0

    def orthogonalize(self, matrix):
        type(self).calls += 1
        return super().orthogonalize(matrix)


COUNTING = OrthoParams(PRESETS["polar"].spectral_normalizer, ClassParam(Counting))
X = gaussian((5, 4))


def model_of(params):
    torch.manual_seed(0)
    layers = [OrthoLinear(4, 4, ortho_params=params) for _ in range(3)]
    layers += [OrthoLinear(4, 6, ortho_params=params), OrthoLinear(6, 4, ortho_params=params)]
    layers += [OrthoLinear(4, 6, ortho_params=params), UnitNormLinear(6, 2)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(gaussian(parameter.shape, seed=number))
    return model


def step(model):
    model.zero_grad()
    y = model(X)
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_values_and_gradients_are_those_of_separate_weights(preset, training):
    model = model_of(PRESETS[preset]).train(training)
    expected = step(model)
    handle = fused(model)
    assert sorted(handle.sizes) == [2, 3]
    found = step(model)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected[0], rtol=1e-11, atol=1e-12)
    handle.remove()
    assert handle.sizes == []
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


def test_one_call_per_group_and_step():
    model = model_of(COUNTING)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for mode, groups in [("apart", 6), ("fused", 3), ("removed", 6)]:
        if mode == "fused":
            handle = fused(model)
        elif mode == "removed":
            handle.remove()
        for _ in range(3):
            optimizer.zero_grad()
            Counting.calls = 0
            model(X).pow(2).sum().backward()
            assert Counting.calls == groups
            optimizer.step()
    handle = fused(model)
    model.eval()
    Counting.calls = 0
    for _ in range(3):
        with torch.no_grad():
            model(X)
    assert Counting.calls == 3


def test_training_is_the_same_training():
    separate = model_of(PRESETS["cholesky"])
    together = copy.deepcopy(separate)
    with fused(together) as handle:
        assert handle.sizes
        for model in (separate, together):
            optimizer = torch.optim.Adam(model.parameters(), 0.1)
            for _ in range(20):
                step(model)
                optimizer.step()
        for a, b in zip(separate.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert handle.sizes == []


def test_a_change_of_one_member_is_seen():
    model = model_of(PRESETS["polar"]).eval()
    handle = fused(model)
    model(X)
    first, second = model[0], model[2]
    kept, before = second.weight.clone(), first.weight.clone()
    with torch.no_grad():
        first.parametrizations.weight.original.add_(gaussian((4, 4), seed=9))
    assert not torch.allclose(first.weight, before)
    torch.testing.assert_close(second.weight, kept, rtol=0, atol=1e-14)
    second.weight = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(second.weight, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    handle.remove()


def test_members_that_take_no_part():
    """An unused layer's parameter gets no gradient, and frozen ones disturb nobody."""
    model = model_of(PRESETS["polar"])
    handle = fused(model)
    model[0].parametrizations.weight.original.requires_grad_(False)
    model[2](X).sum().backward()
    assert model[0].parametrizations.weight.original.grad is None
    assert model[2].parametrizations.weight.original.grad is not None
    assert model[4].parametrizations.weight.original.grad is None
    model[4].eval()  # a group in two modes falls apart, and is right
    torch.testing.assert_close(model[4].weight @ model[4].weight.mT, torch.eye(4, dtype=torch.float64))
    handle.remove()


def test_a_copy_stands_on_its_own():
    model = model_of(COUNTING)
    handle = fused(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].parametrizations.weight.original.add_(1.0)
    assert not torch.allclose(twin[0].weight, model[0].weight)
    step(twin)
    Counting.calls = 0
    step(twin)
    assert Counting.calls == 6
    handle.remove()


def test_the_handle_need_not_be_kept():
    model = model_of(COUNTING)
    fused(model)
    gc.collect()
    step(model)
    Counting.calls = 0
    step(model)
    assert Counting.calls == 3
    fused(model).remove()
    step(model)
    Counting.calls = 0
    step(model)
    assert Counting.calls == 6
    known = weakref.ref(fused(model)._groups[0])
    del model
    gc.collect()
    assert known() is None


def test_a_bad_member_is_named():
    model = model_of(PRESETS["polar"])
    handle = fused(model)
    with torch.no_grad():
        model[2].parametrizations.weight.original.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        model(X)
    handle.remove()


def test_different_arguments_are_different_groups():
    recipes = [
        OrthoParams(orthogonalizer=ClassParam(orthogonalizers.BatchedBjorckOrthogonalization, niters=n))
        for n in (3, 12)
    ]
    model = nn.Sequential(*(OrthoLinear(4, 4, ortho_params=recipe) for recipe in recipes))
    assert fused(model).sizes == []
    assert fused(nn.Sequential(nn.Linear(2, 2))).sizes == []


class Scaled(BatchedPolarOrthogonalization):
    """A gain per layer, kept where the printed form does not show it."""

    def __init__(self, weight_shape, gain, buffer):
        super().__init__(weight_shape)
        if buffer:
            self.register_buffer("gain", torch.tensor(gain))
        else:
            self.gain = gain

    def orthogonalize(self, matrix):
        return self.gain * super().orthogonalize(matrix)


@pytest.mark.parametrize("buffer", [True, False])
def test_hooks_of_ones_own_keep_their_state(buffer):
    makers = [ClassParam(Scaled, gain=gain, buffer=buffer) for gain in (1.0, 3.0)]
    model = nn.Sequential(*(OrthoLinear(4, 4, ortho_params=OrthoParams(orthogonalizer=make)) for make in makers))
    with fused(model):
        norms = [torch.linalg.matrix_norm(layer.weight, ord=2).item() for layer in model]
    assert norms == pytest.approx([1.0, 3.0])
