"""Derivatives: exact, of any order, independent of iteration counts, and accurate in float32."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from orthogonium.linalg import condition_number
from orthogonium.parametrizations import (
    BatchedBjorckOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
)
from orthogonium.reparametrizers import PRESETS
from tests.helpers import (
    EXACT_GRADIENT,
    SKEW_TYPE,
    conditioned,
    constraint,
    gaussian,
    orthogonal_matrix,
    random_matrix,
)

BATCHES = [(2, 3, 3), (2, 2, 5), (2, 5, 2), (1, 1)]
POINTS = {
    "near": lambda shape: random_matrix(shape, singular_values=(0.9, 1.1), dtype=torch.float64, seed=0),
    "far": lambda shape: random_matrix(shape, singular_values=(0.2, 2.0), dtype=torch.float64, seed=0),
    "orthogonal": lambda shape: orthogonal_matrix(shape, seed=0),
    "multiple": lambda shape: 3 * orthogonal_matrix(shape, seed=0),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_first_derivatives(preset, point):
    for shape in BATCHES:
        made = constraint(preset, shape, base_seed=7)
        free = POINTS[point](shape).requires_grad_()
        assert gradcheck(made.compute, free), f"{shape}"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_second_derivatives(preset, point):
    for shape in BATCHES:
        made = constraint(preset, shape, base_seed=7)
        free = POINTS[point](shape).requires_grad_()
        assert gradgradcheck(made.compute, free, gaussian(shape, seed=1).requires_grad_(), fast_mode=True), f"{shape}"


@pytest.mark.parametrize("preset", SKEW_TYPE)
@pytest.mark.parametrize("scale", [0.0, 30.0, 300.0], ids=str)
def test_skew_maps_of_any_size(preset, scale):
    """Zero is where training starts; the larger arguments leave the products for the spectrum."""
    for shape in [(3, 3), (5, 2)]:
        made = constraint(preset, shape, base_seed=7)
        free = (scale * gaussian(shape, seed=1)).requires_grad_()
        assert gradcheck(made.compute, free, eps=1e-6), f"{shape}"


@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_forward_mode(preset):
    for shape in BATCHES:
        made = constraint(preset, shape, base_seed=7)
        free, tangent, cotangent = (gaussian(shape, seed=seed) for seed in range(3))
        _, moved = torch.func.jvp(made.compute, (free,), (tangent,))
        _, pull = torch.func.vjp(made.compute, free)
        torch.testing.assert_close(
            (moved * cotangent).sum(), (tangent * pull(cotangent)[0]).sum(), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_constraint_passes_on_the_derivatives_of_its_parts(preset):
    """Through the shared node of `forward`, first and second derivatives are those of `compute`."""
    shape = (4, 3)
    made = constraint(preset, shape, base_seed=7).train()
    free, direction = gaussian(shape).requires_grad_(), gaussian(shape, seed=1)
    expected, found = [], []
    for function, results in ((made.compute, expected), (made, found)):
        (first,) = torch.autograd.grad((function(free) * direction).sum(), free, create_graph=True)
        results.append(first)
        if preset in EXACT_GRADIENT:
            results.extend(torch.autograd.grad(first.square().sum(), free))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def gradient(hook, free, seed=1):
    free = free.clone().requires_grad_()
    return torch.autograd.grad(hook(free), free, gaussian(free.shape, dtype=free.dtype, seed=seed))[0]


@pytest.mark.parametrize("condition", [1.1, 30.0, 1e4], ids=str)
def test_gradient_does_not_depend_on_the_iteration_count(condition):
    for shape in [(4, 4), (2, 3, 6), (6, 3)]:
        free = conditioned(shape, condition, dtype=torch.float64)
        expected = gradient(BatchedPolarOrthogonalization(shape), free)
        for niters in (0, 1, 3, 12, 50):
            found = gradient(BatchedBjorckOrthogonalization(shape, niters=niters), free)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * condition**2)


def test_exponential_does_not_depend_on_the_iteration_count():
    for shape in [(4, 4), (6, 3)]:
        free = 3 * gaussian(shape)
        hooks = [BatchedExponentialOrthogonalization(shape, niters=niters).double() for niters in (0, 2, 7, 20)]
        for hook in hooks[1:]:
            torch.testing.assert_close(hook(free), hooks[0](free), rtol=0, atol=1e-13)
            torch.testing.assert_close(gradient(hook, free), gradient(hooks[0], free), rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", [1.0, 1.5, 10.0, 100.0], ids=str)
@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_float32_gradient(preset, condition):
    for shape in [(8, 8), (3, 16, 64), (64, 16), (64, 64)]:
        free = conditioned(shape, condition, dtype=torch.float32)
        made = constraint(preset, shape, base_seed=7)
        expected = gradient(made.compute, free.double())
        found = gradient(constraint(preset, shape, torch.float32, base_seed=7).compute, free)
        error = (found - expected).norm() / expected.norm()
        bound = 20 * torch.finfo(torch.float32).eps * condition_number(free).max()  # the derivative grows as κ
        assert error <= bound, f"{shape}: relative error {error:.1e}, allowed {bound:.1e}"


def test_pass_through_is_exact_at_multiples_of_orthogonal_matrices():
    for shape in [(4, 4), (2, 3, 5), (5, 3)]:
        free = 3 * orthogonal_matrix(shape)
        square = shape[-1] == shape[-2]
        hook = BatchedBjorckOrthogonalization(shape, pass_through=True)
        found, expected = gradient(hook, free), gradient(BatchedPolarOrthogonalization(shape), free)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * (1 if square else 4))


def test_pass_through_is_the_derivative_of_the_iteration():
    """At an orthogonal matrix, the derivative of ``niters`` Björck steps written out."""
    from orthogonium.linalg import bjorck

    for beta, niters in [(0.5, 3), (0.3, 2), (0.7, 5), (0.3, 0)]:
        free = orthogonal_matrix((3, 5)).requires_grad_()
        direction = gaussian((3, 5), seed=1)
        (expected,) = torch.autograd.grad(bjorck(free, beta, niters), free, direction)
        hook = BatchedBjorckOrthogonalization((3, 5), beta, niters, pass_through=True)
        (found,) = torch.autograd.grad(hook(free), free, direction)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
