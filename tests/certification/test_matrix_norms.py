import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthogonium.certification.matrix_norms import (
    _absolute_norm_upper_bound,
    _norm_upper_bound,
    _row_distances_upper_bound,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def exact_norm(matrix):
    """The largest singular value to 40 digits."""
    with mpmath.workdps(40):
        return mpmath.svd_r(mpmath.matrix(matrix.double().tolist()), compute_uv=False)[0]


@settings(deadline=None)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    decades=st.floats(0, 8),
    seed=st.integers(0, 10**6),
)
def test_never_below_the_norm_and_close_to_it(m, n, dtype, decades, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=generator, dtype=torch.float64)
    matrix = (matrix * torch.logspace(0, -decades, n, dtype=torch.float64)).to(dtype)
    truth = exact_norm(matrix)
    bound = _norm_upper_bound(matrix)
    assert truth <= bound <= truth * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e30, 1e160, 1e300])
def test_scale_is_harmless(scale):
    matrix = scale * torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    truth = exact_norm(matrix)
    assert truth <= _norm_upper_bound(matrix) <= truth * (1 + 1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 - 1e-7, 1 - 1e-12, 1 + 1e-7, 2.0])
def test_a_wrong_eigenvalue_solver_cannot_make_it_wrong(monkeypatch, factor):
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = exact_norm(matrix)
    solve = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: factor * solve(gram))
    assert _norm_upper_bound(matrix) >= truth


def test_orthogonal_matrices_are_bounded_to_rounding():
    q, _ = torch.linalg.qr(torch.randn(80, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert 1 - 1e-12 <= _norm_upper_bound(q) <= 1 + 1e-7


def test_rank_deficient_zero_and_empty():
    assert _norm_upper_bound(torch.ones(3, 4)) == pytest.approx(math.sqrt(12), rel=1e-6)
    assert _norm_upper_bound(torch.zeros(3, 4)) == 0
    assert _norm_upper_bound(torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_bound(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        _norm_upper_bound(torch.tensor([[1.0, bad]]))


@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 999))
def test_norm_of_absolute_values_is_bounded(m, n, seed):
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert _absolute_norm_upper_bound(matrix) >= torch.linalg.matrix_norm(matrix.abs(), ord=2) * (1 - 1e-14)


def test_row_distances():
    matrix = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 5.0], [0.0, 5.0, 0.0]], dtype=torch.float64)
    distances = _row_distances_upper_bound(matrix)
    assert (distances >= expected).all()
    torch.testing.assert_close(distances, expected, rtol=1e-13, atol=0)
    tiny = torch.tensor([[0.0], [1e-200]], dtype=torch.float64)  # its square underflows
    assert _row_distances_upper_bound(tiny)[0, 1] >= 1e-200
