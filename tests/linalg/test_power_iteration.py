import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthogonium.linalg import power_iteration
from tests.helpers import DTYPES, gaussian, random_matrix

sizes = st.integers(1, 8)


@given(m=sizes, n=sizes, steps=st.integers(1, 30), seed=st.integers(0, 999))
def test_never_above_the_truth(m, n, steps, seed):
    matrix = gaussian((m, n), seed=seed)
    sigma, u, v = power_iteration(matrix, gaussian((m,), seed=seed + 1), steps)
    assert sigma <= torch.linalg.matrix_norm(matrix, ord=2) * (1 + 1e-14)
    assert sigma > 0
    torch.testing.assert_close(u.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(v.norm(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30], ids=str)
def test_limit(scale, dtype):
    for shape in [(6, 4), (2, 3, 5)]:
        matrix = scale * random_matrix(shape, singular_values=(1.0, 0.5), dtype=dtype, seed=0)
        sigma, u, v = power_iteration(matrix, gaussian(shape[:-1], dtype=dtype, seed=1), 200)
        left, values, right = torch.linalg.svd(matrix.double() / scale, full_matrices=False)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(sigma.double() / scale, values[..., 0], rtol=20 * eps, atol=0)
        assert ((u * left[..., 0]).sum(-1).abs() - 1).abs().max() <= 100 * eps
        assert ((v * right[..., 0, :]).sum(-1).abs() - 1).abs().max() <= 100 * eps


def test_warm_starts_follow_a_moving_matrix():
    matrix, drift = gaussian((20, 20)), gaussian((20, 20), seed=1)
    left = gaussian((20,), seed=2)
    for step in range(300):
        moved = matrix + 1e-3 * step * drift
        sigma, left, _ = power_iteration(moved, left, 1)
    truth = torch.linalg.matrix_norm(moved, ord=2)
    assert 0.98 * truth <= sigma <= truth


LOST = {
    "zero": torch.zeros(3),
    "nan": torch.full((3,), torch.nan),
    "infinite": torch.full((3,), torch.inf),
    "all but infinite": torch.full((3,), 3e38),
    "tiny": torch.full((3,), 1e-38),
    "orthogonal to the range": torch.tensor([0.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("start", LOST)
def test_a_lost_direction_is_found_again(start):
    full = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    for matrix, norm in ((torch.diag(torch.tensor([2.0, 1.0, 0.0])), 2.0), (full, 4.0)):
        for number in power_iteration(matrix, LOST[start], 1):
            assert number.isfinite().all()
        sigma, u, v = power_iteration(matrix, LOST[start], 30)
        assert abs(sigma - norm) < 1e-5
        assert u.isfinite().all()
        assert v.isfinite().all()


def test_zero_and_back():
    sigma, u, _ = power_iteration(torch.zeros(3, 2), torch.ones(3), 3)
    assert sigma == 0
    assert u.isfinite().all()
    sigma, _, _ = power_iteration(torch.ones(3, 2), u, 3)
    torch.testing.assert_close(sigma, torch.tensor(6.0).sqrt())


def test_derivative_is_the_outer_product_of_the_vectors():
    matrix = random_matrix((5, 3), singular_values=(2.0, 1.0), dtype=torch.float64, seed=0).requires_grad_()
    sigma, u, v = power_iteration(matrix, gaussian((5,), seed=1), 100)
    (found,) = torch.autograd.grad(sigma, matrix)
    torch.testing.assert_close(found, torch.outer(u, v))
    (exact,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, ord=2), matrix)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="must have shape"):
        power_iteration(torch.ones(3), torch.ones(3), 1)
    with pytest.raises(TypeError, match="floating-point"):
        power_iteration(torch.ones(3, 3, dtype=torch.int64), torch.ones(3), 1)
