"""Many small matrices at once: by products alone, where the guess about their conditioning holds, and never wrong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthogonium.linalg import _polar_routes as routes
from orthogonium.linalg import orthogonality_defect, polar
from orthogonium.linalg._polar_by_products import (
    _MODERATE,
    WITH_DERIVATIVE,
    by_few_products,
    least_source,
    worth_products,
)
from orthogonium.linalg._polar_record import EIGENBASIS, PRODUCTS
from orthogonium.linalg._polar_reverse import polar_backward
from orthogonium.linalg.minimax import polar_schedule
from orthogonium.linalg.polar import polar_value
from tests.helpers import conditioned, contract, gaussian, polar_reference, rounding, with_singular_values

EPS = torch.finfo(torch.float32).eps
BATCHES = [(8, 32, 32), (3, 4, 32, 32), (40, 16, 24), (5, 48, 50)]


def routed(matrix, budget=12):
    return routes.nearest_orthogonal(matrix, budget)


def reference_gradient(matrix, grad):
    """By the float64 SVD, whose derivative does not look at products."""
    matrix = matrix.double()
    return polar_backward(grad.double(), matrix, *routes.by_svd(matrix))


@pytest.mark.parametrize("condition", [2.0, 4.0, 10.0, 20.0, 40.0], ids=str)
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_values_and_gradient(shape, condition):
    """As good as rounding allows: ``eps κ`` in both, and the contract for orthogonality."""
    matrix, grad = conditioned(shape, condition, dtype=torch.float32), gaussian(shape, dtype=torch.float32, seed=1)
    q, *rest = routed(matrix)
    assert rest[-1][0] == PRODUCTS
    assert orthogonality_defect(q).max() <= contract(q)
    unit = shape[-2] ** 0.5 * EPS * condition
    assert torch.linalg.matrix_norm(q.double() - polar_reference(matrix), ord=2).max() <= 2 * unit
    expected = reference_gradient(matrix, grad)
    error = (polar_backward(grad, matrix, q, *rest) - expected).flatten(0, -3).norm(dim=(-2, -1))
    assert (error / expected.flatten(0, -3).norm(dim=(-2, -1))).max() <= 4 * unit


@pytest.mark.parametrize("condition", [1.3, 4.0, 15.0, 25.0], ids=str)
@pytest.mark.parametrize("shape", [(70, 70), (300, 300), (130, 400), (2, 80, 170)], ids=str)
def test_large_matrices(shape, condition):
    """Which take this road on a GPU alone."""
    matrix, grad = conditioned(shape, condition, dtype=torch.float32), gaussian(shape, dtype=torch.float32, seed=1)
    gram = matrix @ matrix.mT
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    variance = shape[-2] * torch.linalg.matrix_norm(gram / squares).square().max().item() - 1
    q, *rest = by_few_products(matrix, gram, variance, budget=12)
    assert orthogonality_defect(q).max() <= contract(q)
    unit = shape[-2] ** 0.5 * EPS * condition
    assert torch.linalg.matrix_norm(q.double() - polar_reference(matrix), ord=2).max() <= 2 * unit
    expected = reference_gradient(matrix, grad)
    assert (polar_backward(grad, matrix, q, *rest) - expected).norm() <= 4 * unit * expected.norm()


@given(
    values=st.lists(st.floats(3e-3, 1.0), min_size=16, max_size=16),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_what_the_derivative_relies_on(values, scale, seed):
    """All singular values lie in the interval that the route names, for any spectrum."""
    values = scale * torch.tensor(values, dtype=torch.float64)
    matrix = with_singular_values((2, 16, 16), values, dtype=torch.float32, seed=seed)
    gram = matrix @ matrix.mT
    for variance in (0.5, 2.0):  # both guesses
        found = by_few_products(matrix, gram, variance, budget=12)
        if found is None:
            continue
        q, _, stretch, route = found
        bound = stretch[:, 0, 0].double()
        assert (values.max() <= bound * (1 + 32 * EPS)).all()
        assert (values.min() >= route[1] * bound).all()
        assert orthogonality_defect(q).max() <= contract(q)


@given(lowest=st.sampled_from([_MODERATE, WITH_DERIVATIVE.lowest]), value=st.floats(0.01, 0.9))
def test_what_a_schedule_takes_to_a_value(lowest, value):
    schedule = polar_schedule(lowest, WITH_DERIVATIVE.settled)
    source = least_source(schedule, value)
    x = torch.cat((torch.linspace(0, source, 500), torch.linspace(source, 1, 5000))).double()
    for a, b, c in schedule:
        x = x * (a + x**2 * (b + c * x**2))
    assert x[:500].max() <= value + 1e-6
    assert x[500:].min() >= value - 1e-6


def test_which_batches_take_this_road():
    def kind(matrix, budget=12):
        return routed(matrix, budget)[-1].tolist()

    def moderate(*shape, dtype=torch.float32):
        return conditioned(shape, 4.0, dtype=dtype)

    assert kind(moderate(8, 32, 32)) == [PRODUCTS, pytest.approx(_MODERATE, rel=0.05)]
    assert kind(conditioned((8, 32, 32), 20.0, dtype=torch.float32)) == [
        PRODUCTS,
        pytest.approx(WITH_DERIVATIVE.lowest, rel=0.05),
    ]
    assert kind(conditioned((8, 32, 32), 30.0, dtype=torch.float32)) == [PRODUCTS, pytest.approx(0.0125, rel=0.1)]
    others = [
        moderate(7, 32, 32),  # too few
        moderate(32, 32),
        moderate(64, 8, 8),  # too small, too large
        moderate(4, 64, 64),
        moderate(8, 32, 64),  # the Gram matrix is cheap beside products with the long side
        moderate(8, 32, 32, dtype=torch.float64),
        1e-6 * moderate(8, 32, 32),  # eighth powers leave the range
        1e6 * moderate(8, 32, 32),
        conditioned((8, 32, 32), 300.0, dtype=torch.float32),
    ]
    for matrix in others:
        assert kind(matrix)[0] == EIGENBASIS, f"{matrix.shape}"
    assert kind(moderate(8, 32, 32), budget=4)[0] == EIGENBASIS
    assert worth_products(moderate(8, 32, 32), derivative=True)
    assert not worth_products(moderate(7, 32, 32), derivative=True)


@pytest.mark.parametrize("condition", [2.0, 20.0, 200.0, 1e4, 1e6], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (48, 90), (128, 100), (2, 96, 96), (256, 256)], ids=str)
def test_the_value_alone(shape, condition):
    """The same factor without a derivative, by more lenient rounds, and by other roads where they do not suffice."""
    matrix = conditioned(shape, condition, dtype=torch.float32).requires_grad_()
    q = polar_value(matrix)
    assert not q.requires_grad
    assert q.stride() == matrix.stride() or shape[-2] > shape[-1]
    assert orthogonality_defect(q).max() <= contract(q)
    unit = min(shape[-2:]) ** 0.5 * EPS * condition
    assert torch.linalg.matrix_norm(q.double() - polar_reference(matrix.detach()), ord=2).max() <= 4 * unit


def test_the_value_alone_takes_products():
    for shape in [(64, 64), (256, 256), (64, 100)]:
        matrix = conditioned(shape, 20.0, dtype=torch.float32)
        assert routes.nearest_orthogonal(matrix, 12, derivative=False)[-1][0] == PRODUCTS
        assert routed(matrix)[-1][0] == EIGENBASIS
    for shape in [(32, 32), (257, 257), (64, 128)]:
        matrix = conditioned(shape, 20.0, dtype=torch.float32)
        assert routes.nearest_orthogonal(matrix, 12, derivative=False)[-1][0] == EIGENBASIS


def from_values(*rows, size=32):
    """A batch of matrices whose singular values are ``rows``, each repeated up to ``size``."""
    values = torch.stack([torch.tensor(row, dtype=torch.float64).repeat(size)[:size] for row in rows])
    u, _, vh = torch.linalg.svd(gaussian((len(rows), size, size), seed=7))
    return ((u * values[:, None]) @ vh).float()


def test_neighbours_in_a_batch():
    """Each is as accurate as its own condition number allows, whatever the others make necessary."""
    plain = [1.0] + [0.52] * 31
    grad = gaussian((8, 32, 32), dtype=torch.float32, seed=2)
    for worst in (8.0, 16.0, 30.0, 45.0, 60.0, 100.0, 1e3, 1e5):
        batch = from_values((1 / worst) ** torch.linspace(0, 1, 32), *[plain] * 5, [1.0, 1 / 3], [1e3, 500.0])
        leaf = batch.clone().requires_grad_()
        q = polar(leaf)
        (found,) = torch.autograd.grad(q, leaf, grad)
        assert orthogonality_defect(q.detach()).max() <= contract(q)
        expected = reference_gradient(batch, grad)
        error = (found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
        assert (error <= 4 * 32**0.5 * EPS * torch.linalg.cond(batch.double())).all(), f"{worst}"


def test_gradients_of_many_losses_at_once():
    matrix = conditioned((8, 32, 32), 4.0, dtype=torch.float32).requires_grad_()
    grads = gaussian((3, 8, 32, 32), dtype=torch.float32, seed=1)
    q = polar(matrix)
    (together,) = torch.autograd.grad(q, matrix, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(together, grads, strict=True):
        (alone,) = torch.autograd.grad(q, matrix, grad, retain_graph=True)
        torch.testing.assert_close(one, alone, rtol=0, atol=rounding(matrix))
