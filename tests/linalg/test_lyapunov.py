import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from orthogonium.linalg.lyapunov import lyapunov, skew_lyapunov_by_sign, skew_lyapunov_near_identity
from tests.helpers import DTYPES, gaussian, orthogonal_matrix


def positive(shape, low, high, *, dtype=torch.float64, seed=0):
    """Symmetric, eigenvalues evenly spread over ``[low, high]``."""
    basis = orthogonal_matrix(shape, seed=seed)
    values = torch.linspace(low, high, shape[-1], dtype=torch.float64)
    matrix = (basis * values) @ basis.mT
    return (0.5 * (matrix + matrix.mT)).to(dtype)


def skew(shape, *, dtype=torch.float64, seed=1):
    matrix = gaussian(shape, seed=seed)
    return (matrix - matrix.mT).to(dtype)


def residual(symmetric, solution, right):
    """Relative to the right-hand side, in units of eps of the solution's type."""
    h, k, c = symmetric.double(), solution.double(), right.double()
    return ((h @ k + k @ h - c).norm() / c.norm() / torch.finfo(solution.dtype).eps).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (2, 3, 4, 4), (32, 32)], ids=str)
def test_solves_the_equation(shape, dtype):
    symmetric = positive(shape, 0.01, 1.0, dtype=dtype)
    right = gaussian(shape, dtype=dtype, seed=2)
    assert residual(symmetric, lyapunov(symmetric, right), right) <= 10 * shape[-1] ** 0.5 * 10


def test_null_directions_get_zero():
    symmetric = torch.diag(torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))
    solution = lyapunov(symmetric, torch.ones(3, 3, dtype=torch.float64))
    expected = torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0.5, 0.5, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(solution, expected)


@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
def test_derivatives(repeated):
    """Repeated eigenvalues included, at which the eigenvectors themselves have no derivative."""
    symmetric = positive((2, 3, 3), 1.0, 1.0 if repeated else 2.0)

    def solve(root, right):
        return lyapunov(0.5 * (root + root.mT), right)

    inputs = symmetric.requires_grad_(), gaussian((2, 3, 3), seed=2).requires_grad_()
    assert gradcheck(solve, inputs, check_forward_ad=True)
    assert gradgradcheck(solve, inputs, fast_mode=True)


def test_vmap_over_one_argument():
    symmetric, right = positive((3, 3), 1.0, 2.0), gaussian((4, 3, 3))
    expected = torch.stack([lyapunov(symmetric, one) for one in right])
    torch.testing.assert_close(torch.vmap(lyapunov, in_dims=(None, 0))(symmetric, right), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.01, 0.1, 0.3, 0.45], ids=str)
def test_near_identity(spread, dtype):
    for shape in [(5, 5), (2, 16, 16)]:
        symmetric = positive(shape, 1 - spread, 1 + spread, dtype=dtype)
        right = skew(shape, dtype=dtype)
        deviation = symmetric - torch.eye(shape[-1], dtype=dtype)
        solution = skew_lyapunov_near_identity(deviation, right, spread)
        assert residual(symmetric, solution, right) <= 40 * shape[-1] ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lowest", [0.3, 1e-2, 1e-3], ids=str)
def test_by_sign(lowest, dtype):
    for shape in [(5, 5), (2, 16, 16)]:
        symmetric = positive(shape, lowest, 1.0, dtype=dtype)
        right = skew(shape, dtype=dtype)
        solution = skew_lyapunov_by_sign(symmetric, right, lowest)
        expected = lyapunov(symmetric.double(), right.double())
        error = ((solution - expected).norm() / expected.norm()).item()
        assert error <= 20 * shape[-1] ** 0.5 * torch.finfo(dtype).eps / lowest
