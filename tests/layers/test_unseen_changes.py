"""Changes that leave the free tensor's version counter alone, and that a remembered weight must follow all the same."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import orthogonium as og
from orthogonium.layers import OrthoConv2d, OrthoLinear
from orthogonium.reparametrizers import PRESETS, BatchedIdentity, BatchedPolarOrthogonalization, OrthoParams
from tests.helpers import gaussian

X = gaussian((3, 4), dtype=torch.float32)


def square():
    torch.manual_seed(0)
    return OrthoLinear(4, 4)


def free_of(layer):
    return layer.parametrizations.weight.original


def assert_fresh(layer):
    """The weight is the one that the free tensors have now."""
    hooks = layer.parametrizations.weight
    expected = hooks[0].compute(*hooks.parameters(recurse=False))
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("training", [True, False])
def test_fused_steps(make, training):
    layer = square().train(training)
    optimizer = make(layer.parameters(), lr=0.5, fused=True)
    (layer(X) * X).sum().backward()
    read = layer.weight * 1.0  # between the backward pass and the step
    optimizer.step()
    assert_fresh(layer)
    with pytest.raises(RuntimeError, match="changed in place before the backward pass"):
        read.sum().backward()


def test_steps_of_an_optimizer_that_writes_through_data():
    class Raw(torch.optim.Optimizer):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1.0)

    layer = square().eval()
    optimizer = Raw(layer.parameters(), {})
    layer(X)
    optimizer.step()
    assert_fresh(layer)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_assigned_is_copied(training):
    source, target = square().train(training), OrthoLinear(4, 4).train(training)
    before = source.weight.detach().clone()
    target.weight = source.weight
    with torch.no_grad():
        free_of(target).add_(gaussian((4, 4), dtype=torch.float32, seed=1))
    assert torch.equal(source.weight, before)
    assigned = before.clone()
    target.weight = assigned
    assigned.zero_()
    torch.testing.assert_close(target.weight, before)
    assert_fresh(target)


def test_memory_that_is_used_again():
    layer = square().eval()
    for seed in range(20):  # the allocator gives the address that was read back to the second of the two
        layer(X)
        for part in range(2):
            fresh = gaussian((4, 4), dtype=torch.float32, seed=2 * seed + part)
            free_of(layer).data = fresh
            del fresh
        assert_fresh(layer)


def test_a_transposed_view_of_the_same_memory():
    layer = square().eval()
    layer(X)
    free_of(layer).data = free_of(layer).data.T
    assert_fresh(layer)


def test_memory_shared_between_processes():
    layer = square().share_memory().eval()
    layer(X)
    free_of(layer).data.copy_(gaussian((4, 4), dtype=torch.float32, seed=1))  # as another process would
    assert_fresh(layer)


@pytest.mark.parametrize("preset", ["exp", "cayley"])
@pytest.mark.parametrize("training", [True, False])
def test_the_base_of_a_turned_frame(preset, training):
    layer = OrthoLinear(4, 4, ortho_params=PRESETS[preset]).train(training)
    before, hook = layer.weight.detach().clone(), layer.parametrizations.weight[0].orthogonalizer
    hook.base.neg_()
    torch.testing.assert_close(layer.weight, -before)
    name = "parametrizations.weight.0.orthogonalizer.base"
    swapped = torch.func.functional_call(layer, {name: -hook.base, "bias": torch.zeros(4)}, (torch.eye(4),))
    torch.testing.assert_close(swapped.T, before)
    torch.testing.assert_close(layer.weight, -before)


class Scaled(nn.Module):
    """An orthogonal matrix times a gain that is trained."""

    def __init__(self, weight_shape):
        super().__init__()
        self.polar = BatchedPolarOrthogonalization(weight_shape)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return self.gain * self.polar(weight)


@pytest.mark.parametrize("training", [True, False])
def test_a_hook_with_a_parameter_of_its_own(training):
    layer = OrthoLinear(4, 4, ortho_params=OrthoParams(BatchedIdentity, Scaled)).train(training)
    gain = layer.parametrizations.weight[0].orthogonalizer.gain
    before = layer.weight.detach() / 2
    (layer.weight * before).sum().backward()
    torch.testing.assert_close(gain.grad, torch.tensor(4.0))
    with torch.no_grad():
        gain.fill_(5.0)
    torch.testing.assert_close(layer.weight, 5 * before)


def test_thawing_one_of_two_free_tensors():
    layer = OrthoConv2d(4, 4, 3).eval()
    frames, image = layer.parametrizations.weight.original1, gaussian((1, 4, 5, 5), dtype=torch.float32)
    frames.requires_grad_(False)
    layer(image)
    frames.requires_grad_(True)
    (layer(image) * gaussian((1, 4, 5, 5), dtype=torch.float32, seed=1)).sum().backward()
    assert frames.grad is not None
    assert frames.grad.abs().max() > 1e-3


def test_thawing_one_of_several_fused_layers():
    model = nn.Sequential(square(), square())
    with og.fused(model):
        model[0].requires_grad_(False)
        model(X)
        model[0].requires_grad_(True)
        (model(X) * X).sum().backward()
        assert free_of(model[0]).grad.abs().max() > 1e-3


def test_other_memory_between_forward_and_backward():
    """The gradient is that of the forward pass, as of an ordinary layer, which has saved what it used."""
    found = []
    for replaced in (False, True):
        layer = square().eval()
        loss = (layer(X) * X).sum()
        if replaced:
            free_of(layer).data = gaussian((4, 4), dtype=torch.float32, seed=1)
        loss.backward()
        found.append(free_of(layer).grad)
    torch.testing.assert_close(found[1], found[0])


def test_threads_that_read_while_another_switches_modes(monkeypatch):
    """What is remembered may be forgotten between two looks at it."""
    layer = square().eval()
    constraint, expected = layer.parametrizations.weight[0], layer.weight.detach().clone()
    may_reuse = type(constraint)._may_reuse

    def interrupted(self, evaluation, position):
        self.forget()
        return may_reuse(self, evaluation, position)

    monkeypatch.setattr(type(constraint), "_may_reuse", interrupted)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.weight, expected)


def test_sharded_parameters():
    """``fully_shard`` fills one and the same tensor again, in the same memory, and keeps its version."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = fully_shard(nn.Sequential(square()).eval(), mesh=mesh)
        optimizer, fresh = torch.optim.SGD(model.parameters(), lr=1.0), nn.Sequential(OrthoLinear(4, 4))
        for _ in range(5):
            model(X).mul(X).sum().backward()
            optimizer.step()
            state = {name: getattr(t, "to_local", t.clone)() for name, t in model.state_dict().items()}
            fresh.load_state_dict(state)
            with torch.no_grad():
                torch.testing.assert_close(model(X), fresh(X))
        layer = square().eval()
        layer(X)  # whose free tensor is filled in place, as an unsharded one may be when its memory comes back
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(free_of(layer)):
            free_of(layer).add_(gaussian((4, 4), dtype=torch.float32, seed=1))
        optimizer.step()
        assert_fresh(layer)
    finally:
        distributed.destroy_process_group()
