"""Every constructor argument changes something, every trainable tensor learns, bad values are named."""

import functools

import pytest
import torch

import orthogonium.linalg.exponential
from orthogonium import reparametrizers
from orthogonium.layers import OrthoLinear
from orthogonium.parametrizations import (
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedIdentity,
    BatchedPowerIteration,
    BatchedQROrthogonalization,
    L2Normalize,
)
from orthogonium.reparametrizers import PRESETS, ClassParam, OrthoParams, preset
from tests.helpers import conditioned, constraint, gaussian, orthogonal_matrix

DOCUMENTED = [
    *("DEFAULT", "DEFAULT_TEST", "BJORCK_PASS_THROUGH", "CHOLESKY", "CHOLESKY_STABLE"),
    *("EXP", "QR", "SVD", "POLAR", "CAYLEY"),
]


def gradient(hook, free):
    free = free.clone().requires_grad_()
    return torch.autograd.grad(hook(free), free, gaussian(free.shape, dtype=free.dtype, seed=1))[0]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_presets_exist(name):
    assert isinstance(getattr(reparametrizers, f"{name}_ORTHO_PARAMS"), OrthoParams)
    assert PRESETS[name.lower()] is getattr(reparametrizers, f"{name}_ORTHO_PARAMS")


@pytest.mark.parametrize("name", reparametrizers.__all__)
def test_names_of_the_front_door(name):
    assert hasattr(reparametrizers, name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_trainable_tensor_learns(name):
    layer = OrthoLinear(4, 4, ortho_params=PRESETS[name])
    (layer(gaussian((5, 4), dtype=torch.float32)) * gaussian((5, 4), dtype=torch.float32, seed=1)).sum().backward()
    assert [key for key, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in layer.parameters())
    assert all(not buffer.requires_grad for buffer in layer.buffers())


def test_power_it_niter_and_eps():
    matrix = gaussian((30, 20))
    sigma = torch.linalg.matrix_norm(matrix, ord=2)
    errors = []
    for niter in (1, 3, 30, 300):
        estimate = torch.linalg.matrix_norm(matrix, ord=2) / torch.linalg.matrix_norm(
            BatchedPowerIteration(matrix.shape, power_it_niter=niter).double()(matrix), ord=2
        )
        assert estimate <= sigma * (1 + 1e-12)
        errors.append(1 - estimate / sigma)
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-6
    lost = torch.diag(
        torch.tensor([1.0, 1e-3])
    )  # started in the direction of the small value, which a large eps calls lost
    results = []
    for eps in (1e-12, 1e-2):
        hook = BatchedPowerIteration((2, 2), power_it_niter=1, eps=eps)
        hook.u.copy_(torch.tensor([0.0, 1.0]))
        results.append(hook(lost))
    assert not torch.allclose(*results)


def test_bjorck_arguments():
    free = conditioned((4, 6), 3.0, dtype=torch.float64)
    through = functools.partial(BatchedBjorckOrthogonalization, (4, 6), pass_through=True)
    exact = BatchedBjorckOrthogonalization((4, 6))
    assert not torch.allclose(gradient(through(), free), gradient(exact, free))  # pass_through
    assert not torch.allclose(gradient(through(beta=0.3), free), gradient(through(beta=0.4), free))
    assert not torch.allclose(gradient(through(beta=0.3, niters=2), free), gradient(through(beta=0.3, niters=3), free))


def test_bjorck_budget_decides_between_products_and_factorisation(monkeypatch):
    import orthogonium.linalg._polar_routes as routes

    calls = []
    factorise = routes.by_eigenbasis
    monkeypatch.setattr(routes, "by_eigenbasis", lambda *a: calls.append(1) or factorise(*a))
    free = conditioned((4, 4), 1.1, dtype=torch.float64)
    BatchedBjorckOrthogonalization((4, 4), niters=12)(free)
    assert not calls
    BatchedBjorckOrthogonalization((4, 4), niters=0)(free)
    assert calls


def test_cholesky_stable_keeps_the_triangular_factor_accurate():
    """The gradient solves with that factor: ``stable=False`` may lose ``eps κ²``, ``stable=True`` must not."""
    free = conditioned((16, 16), 30.0, dtype=torch.float32)
    exact = gradient(BatchedQROrthogonalization((16, 16)), free.double())
    errors = {}
    for stable in (False, True):
        found = gradient(BatchedCholeskyOrthogonalization((16, 16), stable=stable), free)
        errors[stable] = ((found - exact).norm() / exact.norm()).item()
    assert errors[True] < errors[False] / 2
    assert errors[True] <= 10 * 30 * torch.finfo(torch.float32).eps


def test_exponential_budget_decides_between_products_and_spectrum(monkeypatch):
    calls, spectral = [], orthogonium.linalg.exponential.spectral_map
    monkeypatch.setattr(orthogonium.linalg.exponential, "spectral_map", lambda *a: calls.append(1) or spectral(*a))
    free = gaussian((4, 4))
    BatchedExponentialOrthogonalization((4, 4), niters=7).double()(free)
    assert not calls
    BatchedExponentialOrthogonalization((4, 4), niters=0).double()(free)
    assert calls


def test_l2_normalize_dim():
    weight = 3 * gaussian((4, 5))
    for dim in (0, 1, (0, 1)):
        norms = torch.linalg.vector_norm(L2Normalize(dim)(weight), dim=dim)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    assert torch.equal(L2Normalize()(weight), L2Normalize((0, 1))(weight))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300], ids=str)
def test_l2_normalize_of_any_scale(scale):
    free = (scale * gaussian((4, 5))).requires_grad_()
    weight = L2Normalize(1)(free)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    (found,) = torch.autograd.grad(weight, free, gaussian((4, 5), seed=1))
    unit = gaussian((4, 5)).requires_grad_()
    (expected,) = torch.autograd.grad(unit / unit.norm(dim=1, keepdim=True), unit, gaussian((4, 5), seed=1))
    torch.testing.assert_close(found * scale, expected)


def test_l2_normalize_leaves_zero_and_differentiates_twice():
    free = gaussian((3, 4))
    free[1] = 0
    free.requires_grad_()
    weight = L2Normalize(1)(free)
    assert not weight[1].any()
    (first,) = torch.autograd.grad(weight.sum(), free, create_graph=True)
    assert first.isfinite().all()
    assert torch.autograd.gradgradcheck(L2Normalize(1), gaussian((3, 4)).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", PRESETS)
def test_weight_shape(name):
    with pytest.raises(ValueError, match=r"weight_shape must be \(\.\.\., m, n\), got \(3,\)"):
        PRESETS[name].make((3,))
    with pytest.raises(ValueError, match="negative side"):
        PRESETS[name].make((3, -1))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\), got \(3, 4\)"):
        constraint(name, (2, 3, 5))(gaussian((3, 4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchedBjorckOrthogonalization((2, 2), beta=0.0), "beta must be in"),
        (lambda: BatchedBjorckOrthogonalization((2, 2), beta=1.0), "beta must be in"),
        (lambda: BatchedBjorckOrthogonalization((2, 2), beta=float("nan")), "beta must be in"),
        (lambda: BatchedBjorckOrthogonalization((2, 2), niters=-1), "niters must not be negative"),
        (lambda: BatchedExponentialOrthogonalization((2, 2), niters=-1), "niters must not be negative"),
        (lambda: BatchedPowerIteration((2, 2), power_it_niter=0), "power_it_niter must be at least 1"),
        (lambda: BatchedPowerIteration((2, 2), eps=0.0), "eps must be positive"),
        (lambda: preset("nonsense"), "unknown preset 'nonsense'; known are default, "),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_recipes():
    with pytest.raises(TypeError, match="orthogonalizer must be callable"):
        OrthoParams(orthogonalizer=BatchedQROrthogonalization((2, 2)).weight_shape)
    with pytest.raises(TypeError, match="module_class must be a class"):
        ClassParam(3)
    with pytest.raises(AttributeError):
        reparametrizers.DEFAULT_ORTHO_PARAMS.orthogonalizer = None


def test_partial_serves_as_well_as_class_param():
    recipe = OrthoParams(
        functools.partial(BatchedIdentity), functools.partial(BatchedBjorckOrthogonalization, niters=3)
    )
    target = orthogonal_matrix((4, 4), dtype=torch.float32)
    layer = OrthoLinear(4, 4, ortho_params=recipe)
    layer.weight = target
    torch.testing.assert_close(layer.weight, target, rtol=0, atol=1e-6)
    assert ClassParam(BatchedBjorckOrthogonalization, niters=3) == ClassParam(BatchedBjorckOrthogonalization, niters=3)
    assert ClassParam(BatchedBjorckOrthogonalization, niters=3) != ClassParam(BatchedBjorckOrthogonalization, niters=4)
    assert len({ClassParam(BatchedIdentity), ClassParam(BatchedIdentity)}) == 1
    assert repr(ClassParam(BatchedBjorckOrthogonalization, niters=3)) == (
        "ClassParam(BatchedBjorckOrthogonalization, niters=3)"
    )


@pytest.mark.parametrize("name", ["polar", "cholesky_orthogonalize", "qr_orthogonalize", "spectral_norm_bound"])
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=r"matrix must be a torch\.Tensor, got list\. Convert it"):
        getattr(orthogonium.linalg, name)([[1.0]])
