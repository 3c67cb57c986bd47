"""Upper bounds on the spectral norm: never below 40-digit values, close to them, and not fooled by a bad solver."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import orthogonium as og
from orthogonium.linalg import NonFiniteError, spectral_norm_bound
from orthogonium.linalg import _eigenvalue_bound as eigenvalue_bound
from orthogonium.linalg._rounding import gamma
from tests.helpers import conditioned, gaussian, orthogonal_matrix

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALES = {torch.float16: 2, torch.bfloat16: 30, torch.float32: 30, torch.float64: 30}


def exact_norm(matrix):
    """The largest singular value to 40 digits."""
    with mpmath.workdps(40):
        return mpmath.svd_r(mpmath.matrix(matrix.double().tolist()), compute_uv=False)[0]


def reference(matrix):
    """The float64 singular value and what LAPACK may have lost, relative: bounds must not be below their difference."""
    exponent = int(torch.frexp(matrix.double().abs().max()).exponent)
    scaled = torch.ldexp(matrix.double(), torch.tensor(-exponent))
    truth = float(torch.linalg.svdvals(scaled)[0])
    return math.ldexp(truth * (1 - 4 * max(matrix.shape) * 2.0**-52), exponent)


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    decades=st.floats(0, 8),
    scale=st.floats(-1, 1),
    mode=st.sampled_from(["tight", "cheap"]),
    seed=st.integers(0, 10**6),
)
def test_never_below_the_norm_and_close_to_it(m, n, dtype, decades, scale, mode, seed):
    matrix = gaussian((m, n), seed=seed) * torch.logspace(0, -decades, n, dtype=torch.float64)
    matrix = (matrix * 10 ** (scale * SCALES[dtype])).to(dtype)
    truth, bound = exact_norm(matrix), float(spectral_norm_bound(matrix, mode))
    assert truth <= bound
    if mode == "tight":
        assert bound <= truth * (1 + 1e-8)


@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    decades=st.floats(0, 8),
    scale=st.floats(-1, 1),
    seed=st.integers(0, 10**6),
)
def test_larger_matrices(m, n, dtype, decades, scale, seed):
    matrix = (conditioned((m, n), 10**decades, dtype=torch.float64, seed=seed) * 10 ** (scale * SCALES[dtype])).to(
        dtype
    )
    least, bound = reference(matrix), float(spectral_norm_bound(matrix))
    assert least <= bound <= least * (1 + 1e-8) or bound == least == 0


def test_estimates_fall_below_the_norm_where_the_bound_does_not():
    """The tests above can fail: a float32 norm, and power iteration, do what a bound must not."""
    matrices = gaussian((200, 12, 9), dtype=torch.float32, seed=0)
    truths = [exact_norm(matrix) for matrix in matrices[:40]]
    rounded = torch.linalg.matrix_norm(matrices, ord=2)[:40]
    vectors = gaussian((200, 12), dtype=torch.float32, seed=1)
    iterated = og.linalg.power_iteration(matrices, vectors, steps=20)[0][:40]
    assert sum(float(value) < truth for value, truth in zip(rounded, truths, strict=True)) > 8
    assert sum(float(value) < truth for value, truth in zip(iterated, truths, strict=True)) > 20
    bounds = spectral_norm_bound(matrices)[:40]
    assert all(float(bound) >= truth for bound, truth in zip(bounds, truths, strict=True))


def test_a_factor_that_is_none_is_noticed_and_would_not_be_without_its_residual(monkeypatch):
    """A hint that is too small and a Cholesky that lies: the residual alone keeps the bound above the truth."""
    matrices = gaussian((50, 8, 8), seed=0)
    truths = [exact_norm(matrix) for matrix in matrices]
    solve, factor = torch.linalg.eigvalsh, torch.linalg.cholesky_ex

    def lying(matrix):
        shift = 1e-4 * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        found = factor(matrix + shift * torch.eye(8, dtype=torch.float64))
        return found.L, torch.zeros_like(found.info)

    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: solve(gram) * (1 - 1e-6))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lying)
    bounds = spectral_norm_bound(matrices)
    assert all(truth <= float(bound) <= 1.01 * truth for bound, truth in zip(bounds, truths, strict=True))
    exact = eigenvalue_bound._excess
    monkeypatch.setattr(eigenvalue_bound, "_excess", lambda *arguments: 0 * exact(*arguments))
    broken = spectral_norm_bound(matrices)
    assert any(float(bound) < truth for bound, truth in zip(broken, truths, strict=True))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 - 1e-7, 1 - 1e-12, 1 + 1e-7, 2.0, math.nan])
def test_a_wrong_eigenvalue_solver_cannot_make_it_wrong(monkeypatch, factor):
    matrix = gaussian((9, 7))
    truth = exact_norm(matrix)
    solve = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: factor * solve(gram))
    assert truth <= float(spectral_norm_bound(matrix)) <= 3 * truth


def test_a_solver_that_does_not_converge_leaves_the_cheap_bound(monkeypatch):
    def fail(gram):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = gaussian((9, 7))
    cheap = spectral_norm_bound(matrix, mode="cheap")
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    assert spectral_norm_bound(matrix) == cheap


@pytest.mark.parametrize("mode", ["tight", "cheap"])
@pytest.mark.parametrize("shape", [(40, 40), (30, 50), (50, 30), (1, 9), (9, 1)], ids=str)
def test_orthogonal_and_rank_one_matrices_are_bounded_to_rounding(shape, mode):
    q = orthogonal_matrix(shape)
    assert 1 - 1e-14 <= float(spectral_norm_bound(q, mode)) <= 1 + 1e-10
    ones = torch.ones(shape)
    norm = math.sqrt(shape[0] * shape[1])
    assert norm <= float(spectral_norm_bound(ones, mode)) <= norm * (1 + 1e-8)


def test_batches_are_what_their_members_are():
    batch = gaussian((2, 3, 5, 4), seed=3)
    batch[0, 1] = 0
    batch[1, 2] *= 1e-30
    batch[1, 0] *= 1e200
    bounds = spectral_norm_bound(batch)
    assert bounds.shape == (2, 3)
    assert bounds[0, 1] == 0
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(bounds[i, j], spectral_norm_bound(batch[i, j]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e160, 1e300])
def test_scale_is_harmless(scale):
    matrix = scale * torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    truth = exact_norm(matrix)
    slack = 1e-3 if scale < 1e-308 else 1e-8  # subnormal numbers have few digits
    assert truth <= float(spectral_norm_bound(matrix)) <= truth * (1 + slack)


def test_entries_far_apart():
    matrix = torch.tensor([[1e300, 1e-300], [5e-324, 1e-310]], dtype=torch.float64)
    assert 1e300 <= float(spectral_norm_bound(matrix)) <= 1e300 * (1 + 1e-8)
    assert float(spectral_norm_bound(torch.full((2, 2), 1e308, dtype=torch.float64))) == math.inf


def test_flushed_subnormals_are_counted():
    matrix = torch.full((2, 2), 1e-40)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor keeps subnormal numbers")
        bound = float(spectral_norm_bound(matrix))
    finally:
        torch.set_flush_denormal(False)
    assert bound >= exact_norm(matrix)


def test_zero_and_empty():
    assert spectral_norm_bound(torch.zeros(3, 4)) == 0
    assert spectral_norm_bound(torch.zeros(0, 4)) == 0
    assert spectral_norm_bound(torch.zeros(5, 3, 0)).tolist() == [0.0] * 5
    assert spectral_norm_bound(torch.zeros(0, 3, 3)).shape == (0,)


def test_what_it_refuses():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match="NaN or Inf in 1 of 2"):
            spectral_norm_bound(torch.tensor([[1.0, bad]]))
    with pytest.raises(TypeError, match=r"real floating-point tensor, got torch\.complex64"):
        spectral_norm_bound(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        spectral_norm_bound(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., m, n\), got \(3,\)"):
        spectral_norm_bound(torch.ones(3))
    with pytest.raises(ValueError, match="mode must be 'tight' or 'cheap', got 'quick'"):
        spectral_norm_bound(torch.ones(3, 3), mode="quick")


def test_views_gradients_and_defaults_do_not_matter():
    matrix = gaussian((6, 8), dtype=torch.float32).requires_grad_()
    expected = spectral_norm_bound(matrix.detach().clone())
    assert spectral_norm_bound(matrix) == expected
    assert not spectral_norm_bound(matrix).requires_grad
    torch.testing.assert_close(spectral_norm_bound(matrix.T), expected, rtol=1e-12, atol=0)
    assert spectral_norm_bound(matrix[::2, 1::3]) <= expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert spectral_norm_bound(matrix) == expected


def test_many_hermitian_matrices_share_one_bound():
    z = torch.complex(gaussian((150, 6, 6), seed=0), gaussian((150, 6, 6), seed=1))
    h = z @ z.mH
    truth = float(torch.linalg.eigvalsh(h)[:, -1].max())
    level, bound = eigenvalue_bound.common_eigenvalue_bound(h.real, h.imag, h.real.new_zeros(()))
    assert level <= bound
    assert truth * (1 - 1e-14) <= bound <= truth * (1 + 2e-4)
    for start in (0.3 * truth, truth * (1 - 1e-6)):  # a level from elsewhere that is too low
        _, bound = eigenvalue_bound.common_eigenvalue_bound(h.real, h.imag, h.real.new_zeros(()), start)
        assert truth * (1 - 1e-14) <= bound <= truth * (1 + 5e-4)


def test_gamma():
    assert gamma(0) == 0
    assert gamma(10) >= 10 * 2.0**-53
    assert gamma(2**24, roundoff=2.0**-24) == math.inf
