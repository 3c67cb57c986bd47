import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthogonium._checks import check_count, check_weight_shape
from orthogonium.linalg import _gram_schmidt as gs
from orthogonium.linalg import cholesky_orthogonalize, in_working_precision, orthogonality_defect, qr_orthogonalize
from orthogonium.linalg._precision import scaled_to_one, times_power_of_two
from tests.helpers import DTYPES, conditioned, contract, gaussian, gram_schmidt_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(exponent=st.integers(-148, 127), seed=st.integers(0, 99))
def test_scaling_by_powers_of_two_is_exact(dtype, exponent, seed):
    matrix = times_power_of_two(gaussian((2, 3, 4), dtype=dtype, seed=seed), torch.tensor(exponent))
    scaled, found = scaled_to_one(matrix)
    largest = scaled.abs().amax((-2, -1))
    assert ((largest >= 0.5) & (largest < 1) | (largest == 0)).all()
    assert torch.equal(times_power_of_two(scaled, found), matrix)


def test_scaling_zero_and_empty():
    for matrix in (torch.zeros(2, 2), torch.zeros(0, 2)):
        scaled, exponent = scaled_to_one(matrix)
        assert torch.equal(scaled, matrix)
        assert (exponent == 0).all()


def test_half_precision_is_widened_once():
    seen = []

    @in_working_precision
    def function(matrix):
        seen.append(matrix.dtype)
        return matrix / 3

    assert function(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert function(torch.ones(2, 2, dtype=torch.float64)).dtype == torch.float64
    assert seen == [torch.float32, torch.float64]


@pytest.mark.parametrize("stable", [False, True])
def test_cholesky_escalates_instead_of_giving_up(stable):
    """Well conditioned in float32, worse in float64, worst by reflections: always the Gram–Schmidt factor."""
    eps = torch.finfo(torch.float32).eps
    for condition in (1.0, 30.0, 1e3, 1e5, 1e7):
        for shape in [(8, 8), (2, 4, 9), (9, 4)]:
            matrix = conditioned(shape, condition, dtype=torch.float32)
            q = cholesky_orthogonalize(matrix, stable)
            assert orthogonality_defect(q).max() <= contract(q)
            error = (q - gram_schmidt_reference(matrix)).abs().max()
            assert error <= 8 * eps * min(condition, 1e3 if not stable else condition)  # float64 loses nothing


def test_rows_that_depend_on_earlier_ones():
    matrix = gaussian((4, 6))
    matrix[2] = matrix[0] - matrix[1]
    for function in (qr_orthogonalize, cholesky_orthogonalize):
        leaf = matrix.clone().requires_grad_()
        q = function(leaf)
        assert orthogonality_defect(q.detach()) <= contract(q)
        torch.testing.assert_close(q[:2], gram_schmidt_reference(matrix[:2]), rtol=0, atol=1e-13)
        q.backward(gaussian((4, 6), seed=1))
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[2].any()


def test_triangular_solves():
    lower, right = gaussian((2, 4, 4)).tril() + 3 * torch.eye(4), gaussian((2, 4, 5), seed=1)
    torch.testing.assert_close(lower @ gs.solve_lower(lower, right), right)
    torch.testing.assert_close(lower.mT @ gs.solve_lower_transposed(lower, right), right)


def test_checks():
    assert check_weight_shape([2, 3]) == (2, 3)
    check_count("steps", 0)
    with pytest.raises(TypeError, match="steps must be an integer, got True"):
        check_count("steps", True)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        check_count("steps", -1)
