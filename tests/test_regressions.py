"""Failures known from other libraries of orthogonal layers: each is a promise here."""

import pytest
import torch
from torch import nn

from orthogonium.layers import OrthoLinear
from orthogonium.linalg import orthogonality_defect, singular_values
from orthogonium.parametrizations import BatchedPowerIteration
from orthogonium.reparametrizers import (
    BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    CHOLESKY_ORTHO_PARAMS,
    CHOLESKY_STABLE_ORTHO_PARAMS,
    DEFAULT_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    PRESETS,
)
from tests.helpers import constraint, contract, gaussian, orthogonal_matrix

CHOLESKY = {"cholesky": CHOLESKY_ORTHO_PARAMS, "cholesky_stable": CHOLESKY_STABLE_ORTHO_PARAMS}


@pytest.mark.parametrize("preset", CHOLESKY)
def test_a_tall_gaussian_through_cholesky(preset):
    """Factoring the large, singular Gram matrix raises; the small one is the right one."""
    free = gaussian((256, 64), dtype=torch.float32).requires_grad_()
    weight = constraint(preset, free.shape, torch.float32)(free)
    assert orthogonality_defect(weight.detach()) <= contract(weight)
    weight.sum().backward()
    assert free.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("preset", CHOLESKY)
def test_scaled_gaussians_through_cholesky(preset, scale):
    """An absolute epsilon on the Gram matrix shrinks small weights: σ_min 0.006, and σ_max 1.011 for large ones."""
    free = scale * gaussian((64, 64), dtype=torch.float32)
    values = singular_values(constraint(preset, free.shape, torch.float32)(free))
    assert (values - 1).abs().max() <= contract(free)


def test_a_square_gaussian_through_the_default():
    """Twelve Björck steps after a spectral norm from below leave σ_min at 0.09."""
    free = gaussian((256, 256), dtype=torch.float32)
    values = singular_values(constraint("default", free.shape, torch.float32)(free))
    assert (values - 1).abs().max() <= contract(free)


def test_pass_through_has_a_gradient():
    layer = OrthoLinear(8, 8, ortho_params=BJORCK_PASS_THROUGH_ORTHO_PARAMS)
    layer(gaussian((4, 8), dtype=torch.float32)).pow(3).sum().backward()
    assert layer.parametrizations.weight.original.grad.norm() > 0


def test_the_number_of_power_iterations_counts():
    free = gaussian((32, 32))
    results = [BatchedPowerIteration(free.shape, power_it_niter=n).double()(free) for n in (1, 10)]
    assert not torch.allclose(*results)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_zero_weight_and_then_a_normal_one(preset):
    made = constraint(preset, (8, 6), torch.float32).train()
    made(torch.zeros(8, 6))
    for _ in range(2):
        weight = made(gaussian((8, 6), dtype=torch.float32))
        assert orthogonality_defect(weight) <= contract(weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_evaluations_give_the_same_bits(preset):
    layer = OrthoLinear(16, 16, ortho_params=PRESETS[preset]).eval()
    x = gaussian((4, 16), dtype=torch.float32)
    first = layer(x)
    layer.eval()
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("preset", PRESETS)
def test_double(preset):
    layer = OrthoLinear(8, 4, ortho_params=PRESETS[preset]).double()
    layer(gaussian((2, 8))).sum().backward()
    assert orthogonality_defect(layer.weight.detach()) <= contract(layer.weight)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=str)
def test_the_exponential_of_a_matrix_that_is_not_square(shape):
    free = gaussian(shape, dtype=torch.float32).requires_grad_()
    weight = constraint("exp", shape, torch.float32, base_seed=1)(free)
    assert orthogonality_defect(weight.detach()) <= contract(weight)
    weight.sum().backward()
    assert free.grad.isfinite().all()


def test_assigning_an_orthogonal_matrix_to_the_exponential():
    layer = OrthoLinear(16, 16, ortho_params=EXP_ORTHO_PARAMS)
    target = orthogonal_matrix((16, 16), dtype=torch.float32)
    layer.weight = target
    assert orthogonality_defect(layer.weight @ target.mT) <= 2 * contract(target)
    assert torch.linalg.matrix_norm(layer.weight - target, ord=2) <= contract(target)


def test_the_exponential_reaches_a_random_rotation():
    """A map that confines its eigen-angles to one radian stays at distance 4 of 8."""
    layer = OrthoLinear(16, 16, bias=False, ortho_params=EXP_ORTHO_PARAMS)
    layer.weight = torch.eye(16)
    target = orthogonal_matrix((16, 16), dtype=torch.float32, seed=3)
    if torch.linalg.det(target) < 0:
        target[0] *= -1
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    torch.manual_seed(0)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.01 * torch.randn(16, 16))
    for _ in range(500):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    assert (layer.weight - target).norm() < 0.1


def test_cholesky_differentiates_twice():
    free = gaussian((4, 6)).requires_grad_()
    made = constraint("cholesky", free.shape)
    assert torch.autograd.gradgradcheck(made.compute, free, fast_mode=True)


def test_adam_does_not_annihilate_a_weight():
    """Some maps are exactly zero after one step of AdamW with its defaults on a matrix that is not square."""
    for preset in PRESETS:
        layer = OrthoLinear(12, 5, ortho_params=PRESETS[preset])
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(12)).sum().backward()
        optimizer.step()
        assert orthogonality_defect(layer.weight.detach()) <= contract(layer.weight)


def test_the_gradient_at_an_orthogonal_matrix_is_finite():
    """Autograd through an SVD is NaN where singular values repeat."""
    for preset in PRESETS:
        free = torch.eye(6).requires_grad_()
        constraint(preset, (6, 6), torch.float32)(free).pow(3).sum().backward()
        assert free.grad.isfinite().all()


def test_checkpointed_gradients_are_the_same():
    model = nn.Sequential(OrthoLinear(8, 8, ortho_params=DEFAULT_ORTHO_PARAMS), nn.Tanh(), OrthoLinear(8, 8))
    x = gaussian((4, 8), dtype=torch.float32).requires_grad_()
    gradients = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
