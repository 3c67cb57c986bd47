"""The way back in closed form is the way back that autograd takes through the same hook."""

import gc
import weakref

import pytest
import torch

import orthogonium as og
from orthogonium.parametrizations import BatchedCholeskyOrthogonalization, BatchedPolarOrthogonalization, Constraint
from orthogonium.parametrizations.closed_form import closed_form
from orthogonium.parametrizations.normalizers import BatchedIdentity

SHAPES = [(1, 1), (6, 6), (3, 7), (7, 3), (2, 4, 6), (2, 3, 5, 2), (0, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", og.PRESETS)
def test_value_and_gradient_are_those_of_autograd(preset, shape, dtype):
    torch.manual_seed(0)
    hook = og.PRESETS[preset].orthogonalizer(weight_shape=shape)
    free = torch.randn(shape, dtype=dtype)
    grad = torch.randn(shape).to(dtype)
    leaf = free.clone().requires_grad_()
    expected = hook(leaf)
    compute = closed_form(hook)
    (value,), reverse = compute([free])
    assert value.dtype == dtype
    assert torch.equal(value, expected)
    assert not value.requires_grad
    (found,) = reverse([grad])
    (gradient,) = torch.autograd.grad(expected, leaf, grad)
    assert found.dtype == dtype
    assert torch.equal(found, gradient)  # the same operations in the same order
    assert reverse([None]) == [None]


KERNELS = {
    "3x3": {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
    "fewer outputs": {"in_channels": 6, "out_channels": 4, "kernel_size": (2, 5)},
    "stride": {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "stride": 2},
    "groups": {"in_channels": 8, "out_channels": 8, "kernel_size": (3, 4), "groups": 2},
    "1x1": {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
    "matrix alone": {"in_channels": 3, "out_channels": 5, "kernel_size": 2, "stride": 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", ["default", "cholesky", "cayley"])
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_too(case, preset, dtype):
    torch.manual_seed(0)
    layer = og.OrthoConv2d(**KERNELS[case], bias=False, ortho_params=og.PRESETS[preset], dtype=dtype)
    hook = layer.parametrizations.weight[0].orthogonalizer
    free = [torch.randn_like(p) for p in layer.parameters()]
    leaves = [t.clone().requires_grad_() for t in free]
    expected = hook(*leaves)
    grad = torch.randn_like(expected)
    (value,), reverse = closed_form(hook)(free)
    assert torch.equal(value, expected)
    assert not value.requires_grad
    for found, gradient in zip(reverse([grad]), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, gradient)
    assert reverse([None]) == [None] * len(free)


@pytest.mark.parametrize("start", [0.0, 1e-30, 1e30])
def test_special_matrices_have_the_same_gradient(start):
    for preset in ("cholesky", "qr", "polar", "svd"):
        hook = og.PRESETS[preset].orthogonalizer(weight_shape=(3, 5))
        leaf = (start * torch.eye(3, 5)).requires_grad_()
        (gradient,) = torch.autograd.grad(hook(leaf), leaf, torch.ones(3, 5))
        (_,), reverse = closed_form(hook)([leaf.detach()])
        assert torch.equal(reverse([torch.ones(3, 5)])[0], gradient)


class Doubled(BatchedCholeskyOrthogonalization):
    def orthogonalize(self, matrix):
        return 2 * super().orthogonalize(matrix)


class Passed(BatchedPolarOrthogonalization):
    def forward(self, weight):
        return 3 * weight


@pytest.mark.parametrize(("kind", "factor"), [(Doubled, 2.0), (Passed, 3.0)])
def test_a_subclass_with_a_value_of_its_own_goes_through_autograd(kind, factor):
    hook = kind((4, 4))
    assert closed_form(hook) is None
    constraint = Constraint(BatchedIdentity((4, 4)), hook)
    free = torch.nn.Parameter(torch.eye(4))
    weight = constraint(free)
    assert torch.equal(weight, factor * torch.eye(4))
    weight.sum().backward()
    assert free.grad is not None


def test_forward_hooks_are_heard():
    hook = BatchedPolarOrthogonalization((4, 4))
    hook.register_forward_hook(lambda module, args, value: -value)
    assert closed_form(hook) is None
    assert torch.equal(Constraint(BatchedIdentity((4, 4)), hook)(torch.nn.Parameter(torch.eye(4))), -torch.eye(4))


def test_a_weight_of_another_shape_is_refused():
    compute = closed_form(BatchedPolarOrthogonalization((4, 4)))
    with pytest.raises(ValueError, match=r"weight must have shape \(4, 4\), got \(3, 4\)"):
        compute([torch.eye(3, 4)])


def test_what_the_way_back_needs_is_freed_with_it():
    layer = og.OrthoLinear(8, 8, bias=False)
    constraint = layer.parametrizations.weight[0]
    weight = layer.weight
    kept = weakref.ref(constraint._evaluation[0]._pullback.reverse)
    assert kept() is not None
    weight.sum().backward()
    del weight
    gc.collect()
    assert kept() is None
