import pytest
import torch

from orthogonium.linalg import NonFiniteError, condition_number, orthogonality_defect, singular_values, stable_rank
from tests.helpers import gaussian, orthogonal_matrix, with_singular_values

VALUES = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3), (2, 3, 4)], ids=str)
def test_against_known_singular_values(shape):
    matrix = with_singular_values(shape, VALUES, dtype=torch.float64, seed=0)
    batch = shape[:-2]
    torch.testing.assert_close(singular_values(matrix), VALUES.expand(*batch, 3))
    torch.testing.assert_close(orthogonality_defect(matrix), torch.tensor(8.0).double().expand(batch))
    torch.testing.assert_close(condition_number(matrix), torch.tensor(6.0).double().expand(batch))
    torch.testing.assert_close(stable_rank(matrix), torch.tensor(10.25 / 9).double().expand(batch))


def test_defect_sees_small_errors_of_float32():
    matrix = orthogonal_matrix((6, 4))
    matrix[:, 0] *= 1 + 1e-9
    torch.testing.assert_close(orthogonality_defect(matrix).item(), 2e-9, rtol=1e-5, atol=0)
    assert orthogonality_defect(matrix.float()).dtype == torch.float64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200], ids=str)
def test_defect_of_what_is_not_finite(bad):
    matrix = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    matrix[1, 0, 0] = bad
    assert orthogonality_defect(matrix).tolist() == [0.0, torch.inf]


def test_singular_and_empty_matrices():
    zero = torch.zeros(3, 3)
    assert stable_rank(zero) == 0
    assert condition_number(torch.ones(3, 3)) > 1e15
    assert condition_number(zero) == torch.inf
    assert condition_number(torch.zeros(2, 0, 3)).tolist() == [1, 1]
    assert orthogonality_defect(zero) == 1
    assert orthogonality_defect(torch.zeros(2, 0, 3)).tolist() == [0, 0]
    assert stable_rank(torch.eye(4)) == 4
    assert stable_rank(1e-30 * torch.eye(4)) == 4


@pytest.mark.parametrize("function", [orthogonality_defect, singular_values, condition_number, stable_rank])
def test_a_vector_is_not_a_matrix(function):
    with pytest.raises(ValueError, match="must have shape"):
        function(gaussian((3,)))


@pytest.mark.parametrize("function", [orthogonality_defect, singular_values, condition_number, stable_rank])
def test_complex_matrices_are_refused(function):
    with pytest.raises(TypeError, match="real floating-point"):
        function(torch.eye(3, dtype=torch.complex64))


@pytest.mark.parametrize("function", [singular_values, condition_number, stable_rank])
def test_bad_entries_are_named(function):
    with pytest.raises(NonFiniteError, match="in 1 of 9 entries"):
        function(torch.diag(torch.tensor([1.0, torch.nan, 1.0])))
