"""``torch.func``: functional_call, grad, jacrev, vmap, hessian and Hessian-vector products."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from orthogonium.layers import OrthoLinear
from orthogonium.reparametrizers import PRESETS
from tests.helpers import EXACT_GRADIENT, constraint, gaussian

FREE = "parametrizations.weight.original"


def layer_and_loss(preset, size=(3, 4), training=True):
    out_features, in_features = size
    layer = OrthoLinear(in_features, out_features, ortho_params=PRESETS[preset], dtype=torch.float64).train(training)
    x, target = gaussian((5, in_features), seed=1), gaussian((5, out_features), seed=2)
    free = gaussian(size, seed=3)

    def loss(free):
        return (functional_call(layer, {FREE: free}, (x,)) - target).pow(2).mean()

    return layer, loss, free


def ordinary_gradient(layer, loss, free):
    leaf = free.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_functional_call_reads_the_given_tensor(preset, training):
    layer, loss, free = layer_and_loss(preset, training=training)
    layer(torch.ones(4, dtype=torch.float64))
    first, second = loss(free), loss(2 * free.flip(0))
    assert first != second
    assert loss(free) == first
    expected = constraint(preset, (3, 4)).train(training)
    expected.load_state_dict(layer.parametrizations.weight[0].state_dict())
    x = gaussian((5, 4), seed=1)
    y = functional_call(layer, {FREE: free}, (x,))
    torch.testing.assert_close(y, x @ expected(free).mT + layer.bias, rtol=0, atol=1e-14)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_grad_and_jacobians(preset, training):
    layer, loss, free = layer_and_loss(preset, training=training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = ordinary_gradient(layer, loss, free)
    torch.testing.assert_close(grad(loss)(free), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(jacrev(loss)(free), expected, rtol=1e-10, atol=1e-13)
    if preset in EXACT_GRADIENT:
        torch.testing.assert_close(jacfwd(loss)(free), expected, rtol=1e-10, atol=1e-13)
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("preset", PRESETS)
def test_jacobian_of_a_weight(preset):
    made, free = constraint(preset, (3, 2), base_seed=1), gaussian((3, 2))
    jacobian = jacrev(made)(free)
    leaf = free.clone().requires_grad_()
    weight = made(leaf)
    for i in range(3):
        for j in range(2):
            (row,) = torch.autograd.grad(weight[i, j], leaf, retain_graph=True)
            torch.testing.assert_close(jacobian[i, j], row, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_hessian(preset):
    """Three ways to the same second derivatives, and central differences of the gradient."""
    layer, loss, free = layer_and_loss(preset)
    direction = gaussian(free.shape, seed=9)
    full = torch.einsum("abij,ij->ab", hessian(loss)(free), direction)
    forward_over_reverse = jvp(grad(loss), (free,), (direction,))[1]
    leaf = free.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(first, leaf, direction)
    step = 1e-6
    difference = [ordinary_gradient(layer, loss, free + sign * step * direction) for sign in (1, -1)]
    difference = (difference[0] - difference[1]) / (2 * step)
    torch.testing.assert_close(full, difference, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(forward_over_reverse, full, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(reverse_over_reverse, full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("preset", PRESETS)
def test_vmap(preset, in_dim):
    made = constraint(preset, (3, 4), base_seed=1)
    free = gaussian((6, 3, 4))
    moved = free.movedim(0, in_dim)
    expected = torch.stack([made.compute(one) for one in free])
    torch.testing.assert_close(vmap(made, in_dims=in_dim)(moved), expected, rtol=0, atol=1e-13)

    def loss(one):
        return made(one).pow(3).sum()

    leaf = free.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(made.compute(one).pow(3).sum() for one in leaf), leaf)
    torch.testing.assert_close(vmap(grad(loss), in_dims=in_dim)(moved), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_ensemble(preset, training):
    torch.manual_seed(0)
    models = [nn.Sequential(OrthoLinear(4, 3, ortho_params=PRESETS[preset])).double().train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = gaussian((5, 4))
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_per_sample_gradients(preset):
    layer, _, free = layer_and_loss(preset)
    x = gaussian((5, 4), seed=1)

    def loss(free, one):
        return functional_call(layer, {FREE: free}, (one,)).pow(2).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(free, x)
    expected = torch.stack([ordinary_gradient(layer, lambda f, one=one: loss(f, one), free) for one in x])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
