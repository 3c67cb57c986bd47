"""Every road to the polar factor, forced and compared with the float64 SVD, and every way to its derivative."""

import pytest
import torch

from orthogonium.linalg import _polar_routes as routes
from orthogonium.linalg import condition_number, orthogonality_defect, polar, polar_by_svd
from orthogonium.linalg._polar_reverse import polar_backward
from tests.helpers import (
    DTYPES,
    conditioned,
    contract,
    gaussian,
    orthogonal_matrix,
    polar_reference,
    random_matrix,
    with_singular_values,
)

WIDE = [(1, 1), (1, 4), (6, 6), (3, 7), (2, 5, 9), (2, 3, 4, 4), (16, 64)]


def through_near(matrix):
    gram = matrix @ matrix.mT
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    variance = matrix.shape[-2] * torch.linalg.matrix_norm(gram / squares[..., None, None]).square() - 1
    return routes.near(matrix, gram, squares, variance.max().item(), budget=12)


def through_eigenbasis(matrix):
    return routes.by_eigenbasis(matrix, matrix @ matrix.mT)


def through_minimax(matrix):
    return routes.by_minimax(matrix) or routes.by_svd(matrix)


ROADS = {
    "eigenbasis": through_eigenbasis,
    "svd": routes.by_svd,
    "minimax": through_minimax,
    "fixed_schedule": routes.by_fixed_schedule,
}


def noise(road, dtype):
    """In units of ``√n eps κ``: what the rounding errors of a road come to.

    Eight minimax steps, each up to 8.5 steep, amplify them a little; thirty, with no wider type to run in, a lot.
    """
    return {"minimax": 32, "fixed_schedule": 4 if dtype == torch.float32 else 2**15}.get(road, 4)


def error_in_eps(q, matrix):
    """Distance to the polar factor in units of ``√n eps κ``."""
    distance = torch.linalg.matrix_norm(q.double() - polar_reference(matrix), ord=2)
    unit = min(matrix.shape[-2:]) ** 0.5 * torch.finfo(matrix.dtype).eps
    return (distance / unit / condition_number(matrix)).max().item()


def reference_gradient(matrix, grad):
    """The adjoint derivative in float64: solve ``H K + K H = G Qᵀ − Q Gᵀ`` as one linear system per matrix."""
    q = polar_reference(matrix)
    matrix, grad = matrix.double(), grad.double()
    stretch = matrix @ q.mT
    right = grad @ q.mT - q @ grad.mT
    identity = torch.eye(matrix.shape[-2], dtype=torch.float64)
    system = torch.einsum("...ij,kl->...ikjl", stretch, identity) + torch.einsum("ij,...lk->...ikjl", identity, stretch)
    n = matrix.shape[-2]
    solution = torch.linalg.solve(system.reshape(*matrix.shape[:-2], n * n, n * n), right.flatten(-2))
    solution = solution.unflatten(-1, (n, n))
    return solution @ q + torch.linalg.solve(stretch, grad - (grad @ q.mT) @ q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e5], ids=str)
def test_each_road_leads_to_the_polar_factor(road, condition, dtype):
    for shape in WIDE:
        matrix = conditioned(shape, condition, dtype=dtype)
        q = ROADS[road](matrix)[0]
        assert orthogonality_defect(q).max() <= contract(q), f"{shape}"
        assert error_in_eps(q, matrix) <= noise(road, dtype), f"{shape}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3], ids=str)
def test_each_road_leads_back(road, condition, dtype):
    """The derivative that goes with the road, against a dense linear solve."""
    for shape in WIDE:
        matrix, grad = conditioned(shape, condition, dtype=dtype), gaussian(shape, dtype=dtype, seed=1)
        routed = ROADS[road](matrix)
        found = polar_backward(grad, matrix, *routed)
        expected = reference_gradient(matrix, grad)
        error = (found - expected).norm() / expected.norm()
        bound = noise(road, dtype) * shape[-2] ** 0.5 * torch.finfo(dtype).eps * condition
        assert error <= bound or expected.norm() == 0 == found.norm(), f"{shape}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_lead_back_from_every_condition(dtype):
    """Beyond the first schedule, and a little below the values that a schedule is made for."""
    for condition in (400.0, 1e3, 3e3, 1e4, 1e5, 1e6):
        matrix, grad = conditioned((30, 50), condition, dtype=dtype), gaussian((30, 50), dtype=dtype, seed=1)
        found = polar_backward(grad, matrix, *through_minimax(matrix))
        expected = reference_gradient(matrix, grad)
        bound = noise("minimax", dtype) * 30**0.5 * torch.finfo(dtype).eps * condition
        assert (found - expected).norm() <= min(bound, 1e-4) * expected.norm(), f"{condition:.0e}"


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_the_fixed_schedule_leads_back_from_every_scale(scale):
    matrix, grad = conditioned((4, 6), 3.0, dtype=torch.float64), gaussian((4, 6), seed=1)
    found = polar_backward(grad, scale * matrix, *routes.by_fixed_schedule(scale * matrix))
    torch.testing.assert_close(scale * found, reference_gradient(matrix, grad), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.003, 0.02, 0.1, 0.18], ids=str)
def test_the_near_road(spread, dtype):
    """Taken close to a multiple of an orthogonal matrix, in one polynomial whose degree follows the distance."""
    taken = []
    for shape in WIDE:
        for scale in (1.0, 50.0):
            matrix = scale * random_matrix(shape, singular_values=(1 - spread, 1 + spread), dtype=dtype, seed=0)
            routed = through_near(matrix)
            taken.append(routed is not None)
            if routed is None:
                continue
            assert orthogonality_defect(routed[0]).max() <= contract(matrix), f"{shape}"
            assert error_in_eps(routed[0], matrix) <= 4, f"{shape}"
            grad = gaussian(shape, dtype=dtype, seed=1)
            found = polar_backward(grad, matrix, *routed)
            expected = reference_gradient(matrix, grad)
            bound = 20 * shape[-2] ** 0.5 * torch.finfo(dtype).eps
            assert (found - expected).norm() <= bound * max(expected.norm(), grad.norm() / scale), f"{shape}"
    reach = {torch.float32: 0.18, torch.float64: 0.02}[dtype]
    assert all(taken) or spread >= reach


def test_the_bound_of_the_near_road_is_no_guess():
    """The spectrum that the near road has promised itself holds for random spectra of every size."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        values = 1 + 0.25 * (2 * torch.rand(6, generator=generator, dtype=torch.float64) - 1)
        matrix = with_singular_values((6, 9), values, dtype=torch.float64, seed=seed)
        routed = through_near(matrix)
        if routed is not None:
            center = routed[2][0] ** 2
            assert (values.square() / center - 1).abs().max() <= routed[3][1] * (1 + 1e-12)


def test_which_road_is_taken():
    def kind(matrix, budget=12):
        return routes.nearest_orthogonal(matrix, budget)[3].tolist()

    near = random_matrix((6, 6), singular_values=(0.95, 1.05), dtype=torch.float32, seed=0)
    far = random_matrix((6, 6), singular_values=(0.1, 2.0), dtype=torch.float32, seed=0)
    assert kind(near)[0] == routes.NEAR
    assert kind(near, budget=0) == [routes.EIGENBASIS, 0]
    assert kind(near, budget=routes.SVD_ONLY)[0] == routes.EIGENBASIS
    assert kind(far) == [routes.EIGENBASIS, 0]
    assert kind(torch.ones(6, 6)) == [routes.EIGENBASIS, 1]
    assert kind(1e-30 * far)[0] == routes.EIGENBASIS
    assert kind(1e30 * near)[0] == routes.EIGENBASIS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_conditions_by_the_roads_for_them(dtype):
    condition = {torch.float32: 1e6, torch.float64: 1e12}[dtype]
    for shape in [(6, 6), (2, 5, 9), (16, 64)]:
        matrix = conditioned(shape, condition, dtype=dtype)
        for name, road in ROADS.items():
            q = road(matrix)[0]
            assert orthogonality_defect(q).max() <= contract(q)
            assert error_in_eps(q, matrix) <= noise(name, dtype)


@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(dtype, c) for dtype in DTYPES for c in (20.0, 50.0, 3e3, 2e4, 1e5, 1e6)] + [(torch.float64, 1e7)],
    ids=str,
)
def test_the_road_changes_before_digits_are_lost(condition, dtype):
    """A Gram matrix loses ``eps κ²``: whatever road `polar` takes, weight and gradient are good to ``eps κ``.

    Below κ = 32, where a Gram matrix of the same type is good enough, the gradient may lose one ``eps κ²`` a row at
    worst (1,200 draws reach 0.7 of it) and a quarter of it in the median (they reach 0.14).
    """
    values = torch.tensor([1.0, 1.0, 0.9, 1.2 / condition, 1.1 / condition, 1 / condition], dtype=torch.float64)
    same_type = condition < 32
    errors = []
    for shape in [(6, 6), (6, 9), (9, 6)]:
        for seed in range(10 if same_type else 1):
            matrix = with_singular_values(shape, values, dtype=dtype, seed=seed).requires_grad_()
            grad = gaussian(shape, dtype=dtype, seed=seed + 1)
            q = polar(matrix)
            (found,) = torch.autograd.grad(q, matrix, grad)
            assert error_in_eps(q.detach(), matrix.detach()) <= 4, f"{shape}"
            wide = [t.detach().mT if shape[0] > shape[1] else t.detach() for t in (matrix, grad, found)]
            expected = reference_gradient(*wide[:2])
            error = (wide[2] - expected).norm() / expected.norm()
            errors.append(error / (min(shape) ** 0.5 * torch.finfo(dtype).eps * condition))
    assert max(errors) <= (condition if same_type else 4)
    assert torch.tensor(errors).median() <= (condition / 4 if same_type else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fixed_schedule_completes_singular_matrices(dtype):
    for matrix in (torch.zeros(3, 5, dtype=dtype), torch.ones(3, 5, dtype=dtype), torch.ones(4, 4, dtype=dtype)):
        for scale in (1.0, 1e-30, 1e30):
            q, *rest = routes.by_fixed_schedule(scale * matrix)
            assert orthogonality_defect(q) <= contract(q)
            gradient = polar_backward(gaussian(q.shape, dtype=dtype), scale * matrix, q, *rest)
            assert gradient.isfinite().all()
    assert torch.equal(routes.by_fixed_schedule(torch.zeros(3, 5, dtype=dtype))[0], torch.eye(3, 5, dtype=dtype))


def test_members_of_a_batch_do_not_disturb_each_other():
    """Each gets what it would get alone, whatever road the worst of them forces on all."""
    members = [
        orthogonal_matrix((4, 6)),
        conditioned((4, 6), 1e3, dtype=torch.float64),
        torch.zeros(4, 6, dtype=torch.float64),
        1e-20 * gaussian((4, 6)),
        1e20 * gaussian((4, 6)),
        torch.ones(4, 6, dtype=torch.float64),
    ]
    grads = gaussian((6, 4, 6), seed=1)
    batch = torch.stack(members).requires_grad_()
    together = polar(batch)
    together.backward(grads)
    for i, member in enumerate(members):
        leaf = member.clone().requires_grad_()
        alone = polar(leaf)
        alone.backward(grads[i])
        assert orthogonality_defect(together[i].detach()) <= contract(member)
        if i not in (2, 5):  # completions are a convention of the road
            torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-11)
            error = (batch.grad[i] - leaf.grad).norm() / leaf.grad.norm()
            assert error <= 1e-10
        assert batch.grad[i].isfinite().all()


def test_svd_alone_agrees():
    for shape in [(4, 4), (2, 3, 7), (7, 3)]:
        matrix = gaussian(shape)
        torch.testing.assert_close(polar_by_svd(matrix), polar(matrix), rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [polar, polar_by_svd])
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"shape \(\.\.\., m, n\), got \(3,\)"):
        function(torch.ones(3))
    with pytest.raises(TypeError, match=r"real floating-point tensor, got torch\.int64"):
        function(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 9"):
        function(torch.ones(3, 3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))
