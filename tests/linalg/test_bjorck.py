import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from orthogonium.linalg import bjorck, polar, polar_pass_through
from tests.helpers import DTYPES, gaussian, polar_reference, random_matrix, rounding

sizes = st.integers(1, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (7, 3), (2, 5, 3)], ids=str)
def test_limit_is_the_polar_factor(shape, dtype):
    matrix = random_matrix(shape, singular_values=(0.2, 1.0), dtype=dtype, seed=0)
    found = bjorck(matrix, steps=20).double()
    torch.testing.assert_close(found, polar_reference(matrix), rtol=0, atol=rounding(matrix))


def test_one_step_is_the_formula():
    matrix = gaussian((3, 5))
    expected = 1.3 * matrix - 0.3 * matrix @ matrix.mT @ matrix
    torch.testing.assert_close(bjorck(matrix, 0.3, 1), expected)
    torch.testing.assert_close(bjorck(matrix.mT, 0.3, 1), expected.mT)
    assert torch.equal(bjorck(matrix, 0.3, 0), matrix)


@given(m=sizes, n=sizes, steps=st.integers(0, 30), seed=st.integers(0, 999))
def test_never_expands_a_contraction(m, n, steps, seed):
    matrix = random_matrix((m, n), singular_values=(0.0, 1.0), dtype=torch.float64, seed=seed)
    assert torch.linalg.matrix_norm(bjorck(matrix, steps=steps), ord=2) <= 1 + rounding(matrix)


def test_gradient():
    matrix = random_matrix((3, 4), singular_values=(0.5, 1.0), dtype=torch.float64, seed=0)
    assert gradcheck(lambda x: bjorck(x, steps=4), matrix.requires_grad_())


def test_pass_through_has_the_value_of_the_polar_factor_and_a_gradient():
    for shape in [(4, 4), (2, 3, 5), (5, 3)]:
        matrix = gaussian(shape).requires_grad_()
        q = polar_pass_through(matrix)
        assert torch.equal(q, polar(matrix))
        q.backward(gaussian(shape, seed=1))
        assert matrix.grad.norm() > 0
        tall = shape[-2] > shape[-1]
        tangent = q.detach().mT @ matrix.grad if tall else matrix.grad @ q.detach().mT
        torch.testing.assert_close(tangent + tangent.mT, torch.zeros_like(tangent), rtol=0, atol=1e-13)


def test_a_vector_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(\.\.\., m, n\), got \(3,\)"):
        bjorck(torch.ones(3))
