"""Steps on the manifold, against dense references in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from orthogonium.linalg import (
    NonFiniteError,
    cayley_retraction,
    geodesic_retraction,
    low_rank_factors,
    low_rank_geodesic_update,
    low_rank_polar_update,
    orthogonality_defect,
    polar_retraction,
    soft_polar,
    tangent_projection,
)
from orthogonium.linalg.retractions import polar_factors
from tests.helpers import (
    DTYPES,
    contract,
    dense_exponential,
    gaussian,
    orthogonal_matrix,
    polar_reference,
    random_matrix,
    rounding,
)

SHAPES = [(1, 1), (6, 6), (20, 20), (20, 7), (7, 20), (3, 8, 8), (2, 3, 9, 5)]
RETRACTIONS = [polar_retraction, cayley_retraction, geodesic_retraction]
LOW_RANK = [low_rank_polar_update, low_rank_geodesic_update]


def factors(shape, rank, norm, dtype, seed=0):
    """Gaussian ``a`` and ``b`` with ``‖a bᵀ‖₂`` at most ``norm``."""
    a, b = gaussian((*shape[:-1], rank), seed=seed), gaussian((*shape[:-2], shape[-1], rank), seed=seed + 1)
    size = torch.linalg.matrix_norm(a @ b.mT, 2).amax()
    return (a * (norm / size)).to(dtype), b.to(dtype)


def dense_geodesic(point, step):
    """``exp(A) Q`` with the ``m × m`` skew matrix written out; tall points."""
    if point.shape[-2] < point.shape[-1]:
        return dense_geodesic(point.mT, step.mT).mT
    cross = point.mT @ step
    tangent = step - 0.5 * point @ (cross + cross.mT)
    inner = tangent - 0.5 * point @ (point.mT @ tangent)
    return dense_exponential(inner @ point.mT - point @ inner.mT) @ point


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tangent_projection_is_the_nearest_tangent(shape, dtype):
    point, direction = orthogonal_matrix(shape, dtype=dtype, seed=1), gaussian(shape, dtype=dtype, seed=2)
    tangent = tangent_projection(point, direction)
    short = point if shape[-2] <= shape[-1] else point.mT
    cross = (tangent if shape[-2] <= shape[-1] else tangent.mT) @ short.mT
    assert_close(cross, -cross.mT, rtol=0, atol=rounding(point))
    assert_close(tangent_projection(point, tangent), tangent, rtol=0, atol=rounding(point))
    other = tangent_projection(point, gaussian(shape, dtype=dtype, seed=3))
    assert abs(((direction - tangent) * other).sum()) <= rounding(point) * other.norm() * direction.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("retraction", RETRACTIONS, ids=lambda f: f.__name__)
def test_retractions_follow_the_step_to_first_order_and_stay_orthogonal(retraction, shape, dtype):
    point, direction = orthogonal_matrix(shape, dtype=dtype, seed=1), gaussian(shape, dtype=dtype, seed=2)
    for size in (0.0, 1e-3, 1.0, 30.0):
        assert (orthogonality_defect(retraction(point, size * direction)) <= 3 * contract(point)).all(), size
    point, direction = point.double(), direction.double()
    tangent = tangent_projection(point, direction)
    h = 1e-4
    slope = (retraction(orthogonal_matrix(shape, seed=1), h * tangent) - orthogonal_matrix(shape, seed=1)) / h
    bound = 10 * h * tangent.norm() ** 2  # second order
    assert (slope - tangent_projection(orthogonal_matrix(shape, seed=1), direction)).norm() <= bound + 1e-9


@pytest.mark.parametrize("retraction", [cayley_retraction, geodesic_retraction], ids=lambda f: f.__name__)
def test_turns_ignore_the_normal_part_and_keep_the_determinant(retraction):
    point, step = orthogonal_matrix((5, 5), seed=1), gaussian((5, 5), seed=2)
    symmetric = gaussian((5, 5), seed=3)
    assert_close(retraction(point, step + point @ (symmetric + symmetric.mT)), retraction(point, step))
    assert_close(torch.linalg.det(retraction(point, 10 * step)), torch.linalg.det(point))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (3, 9, 4)], ids=str)
def test_geodesics_against_the_written_out_exponential(shape):
    point, step = orthogonal_matrix(shape, seed=1), gaussian(shape, seed=2)
    assert_close(geodesic_retraction(point, step), dense_geodesic(point, step), rtol=0, atol=rounding(point))


@pytest.mark.parametrize("norm", [0.0, 1e-8, 0.3, 1.7, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_polar_update_is_the_polar_factor(shape, dtype, norm):
    point, (a, b) = orthogonal_matrix(shape, dtype=dtype, seed=5), factors(shape, 3, norm, dtype)
    updated = low_rank_polar_update(point, a, b)
    moved = point.double() + a.double() @ b.double().mT
    condition = torch.linalg.cond(moved).amax().item()
    allowed = rounding(point) * (1 + max(1.0, norm) * condition / max(norm, 1.0))
    assert_close(updated.double(), polar_reference(moved), rtol=0, atol=allowed)
    assert (orthogonality_defect(updated) <= 8 * contract(point)).all()  # the point's own defect, and the step's


@pytest.mark.parametrize("norm", [0.0, 1e-8, 0.02, 0.3, 1.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_geodesic_update_is_the_geodesic(shape, dtype, norm):
    point, (a, b) = orthogonal_matrix(shape, dtype=dtype, seed=5), factors(shape, 3, norm, dtype)
    updated = low_rank_geodesic_update(point, a, b)
    expected = dense_geodesic(point.double(), a.double() @ b.double().mT)
    assert_close(updated.double(), expected, rtol=0, atol=3 * rounding(point))
    assert (orthogonality_defect(updated) <= 4 * contract(point)).all()


@pytest.mark.parametrize("norm", [0.025, 0.3, 1.0, 6.28, 25.0])
@pytest.mark.parametrize("shape", [(16, 7), (9, 9)], ids=str)
def test_geodesics_of_every_length_stay_orthogonal(shape, norm):
    """In float64, whose rounding no wider type hides. Each squaring of a long turn doubles its rounding errors."""
    for seed in range(10):
        point = orthogonal_matrix(shape, seed=seed)
        updated = low_rank_geodesic_update(point, *factors(shape, 4, norm, torch.float64, seed=seed))
        assert orthogonality_defect(updated) <= contract(point) * max(1.0, norm / 10)


@pytest.mark.parametrize("update", LOW_RANK)
def test_a_long_step_of_a_neighbour_does_not_matter(update):
    points, (a, b) = orthogonal_matrix((2, 16, 7)), factors((2, 16, 7), 2, 0.1, torch.float64)
    for length in (30.0, 1e4, 1e8):
        a[1] *= length / torch.linalg.matrix_norm(a[1])
        together = update(points, a, b)
        assert_close(together[0], update(points[0], a[0], b[0]), rtol=0, atol=rounding(points) / 10)


@pytest.mark.parametrize("update", LOW_RANK)
def test_no_points_at_all(update):
    for m, n in [(8, 8), (8, 4), (4, 8)]:
        assert update(torch.randn(0, m, n), torch.randn(0, m, 2), torch.randn(0, n, 2)).shape == (0, m, n)


def test_the_outside_of_a_tall_point_may_be_of_any_rank():
    """``a`` in the column space, half in it, and with equal columns."""
    point = orthogonal_matrix((9, 4), dtype=torch.float32, seed=1)
    b = gaussian((4, 2), dtype=torch.float32, seed=2)
    inside = point @ gaussian((4, 1), dtype=torch.float32, seed=3)
    outside = gaussian((9, 1), dtype=torch.float32, seed=4)
    for a in (torch.cat((inside, inside), 1), torch.cat((inside, outside), 1), torch.cat((outside, outside), 1)):
        for update in LOW_RANK:
            assert orthogonality_defect(update(point, a, b)) <= 4 * contract(point)
        reference = polar_reference(point.double() + a.double() @ b.double().mT)
        assert_close(low_rank_polar_update(point, a, b).double(), reference, rtol=0, atol=30 * rounding(point))


def test_a_step_that_would_lose_digits_goes_the_dense_way():
    point = orthogonal_matrix((9, 4), dtype=torch.float32, seed=1)
    b = orthogonal_matrix((4, 2), dtype=torch.float32, seed=2)
    normal = gaussian((9, 2), dtype=torch.float32, seed=3)
    normal = 1e3 * (normal - point @ (point.mT @ normal))
    opposed = -point @ b + 1e-3 * normal / normal.norm()  # W + a bᵀ is nearly singular
    a = torch.cat((opposed[:, :1], normal[:, :1]), 1)
    assert polar_factors(point, a, b) is None
    assert orthogonality_defect(low_rank_polar_update(point, a, b)) <= contract(point)


@pytest.mark.parametrize("update", LOW_RANK, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(16, 16), (24, 10)], ids=str)
def test_errors_of_many_large_steps_add_up_and_do_not_multiply(update, shape):
    point = orthogonal_matrix(shape, dtype=torch.float32, seed=1)
    for step in range(500):
        point = update(point, *factors(shape, 2, 1.7, torch.float32, seed=step))
    assert orthogonality_defect(point) <= 500**0.5 * contract(point)  # 7e-4 would be 500 times a step's error


sizes = st.integers(1, 9)


@given(m=sizes, n=sizes, rank=sizes, seed=st.integers(0, 999))
def test_any_rank_and_shape(m, n, rank, seed):
    point, (a, b) = orthogonal_matrix((m, n), seed=seed), factors((m, n), rank, 0.5, torch.float64, seed=seed)
    reference = polar_reference(point + a @ b.mT)
    assert_close(low_rank_polar_update(point, a, b), reference, rtol=0, atol=1e-11)
    assert_close(
        low_rank_geodesic_update(point, a, b), dense_geodesic(point, a @ b.mT), rtol=0, atol=3 * rounding(point)
    )


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_transforms_of_large_single_precision_points(retraction):
    point, step = orthogonal_matrix((128, 128)).float(), gaussian((2, 128, 128), seed=1).float() / 100
    together = torch.vmap(retraction, in_dims=(None, 0))(point, step)
    assert_close(together[1], retraction(point, step[1]), rtol=0, atol=1e-5)
    _, moved = torch.func.jvp(lambda s: retraction(point, s), (step[0],), (step[1],))
    ends = [retraction(point, step[0] + h * step[1]) for h in (0.1, -0.1)]
    assert_close(moved, (ends[0] - ends[1]) / 0.2, rtol=0, atol=1e-4)


def test_half_precision_is_computed_in_float32_and_rounded_once():
    point, (a, b) = orthogonal_matrix((8, 8), dtype=torch.bfloat16), factors((8, 8), 2, 0.5, torch.bfloat16)
    wide = [t.float() for t in (point, a, b)]
    for update in LOW_RANK:
        assert torch.equal(update(point, a, b), update(*wide).bfloat16())
    for retraction in RETRACTIONS:
        expected = retraction(point.float(), 0.1 * point.float()).bfloat16()
        assert torch.equal(retraction(point, (0.1 * point.float())), expected)


def test_refusals():
    point = orthogonal_matrix((4, 4))
    for update in LOW_RANK:
        with pytest.raises(ValueError, match=r"right must have shape \(4, 'k'\).*got \(4, 3\)"):
            update(point, torch.ones(4, 2), torch.ones(4, 3))
        with pytest.raises(NonFiniteError, match="left"):
            update(point, torch.full((4, 1), torch.nan, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"step must have the shape of point, \(4, 4\), got \(3, 4\)"):
        polar_retraction(point, torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"direction.*torch.int64"):
        tangent_projection(point, torch.ones(4, 4, dtype=torch.int64))


@pytest.mark.parametrize("method", ["subspace", "columns"])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (3, 6, 6)], ids=str)
def test_factors_of_a_matrix_of_that_rank_are_exact(shape, method):
    a, b = factors(shape, 2, 1.0, torch.float64)
    left, right = low_rank_factors(a @ b.mT, 2, method, generator=torch.Generator().manual_seed(0))
    assert_close(left @ right.mT, a @ b.mT, rtol=0, atol=1e-12)
    assert_close(left.mT @ left, torch.eye(2, dtype=torch.float64).expand(*shape[:-2], 2, 2), rtol=0, atol=1e-13)


def test_subspace_iteration_tends_to_the_best_approximation_and_a_start_helps():
    matrix = random_matrix((30, 20), singular_values=(0.0, 1.0), dtype=torch.float64, seed=1)
    _, s, vh = torch.linalg.svd(matrix)
    best = s[3:].norm()

    def error(**keywords):
        left, right = low_rank_factors(matrix, 3, generator=torch.Generator().manual_seed(1), **keywords)
        return (matrix - left @ right.mT).norm()

    assert error(steps=200) <= 1.0001 * best
    assert error(start=vh[:3].mT.contiguous()) <= 1.0001 * best < error()


def test_columns_are_drawn_by_their_norms_and_zeros_last():
    matrix = torch.zeros(5, 6)
    matrix[:, 3], matrix[:, 1] = torch.arange(1.0, 6.0), torch.ones(5)
    left, right = low_rank_factors(matrix, 2, "columns")
    assert_close(left @ right.mT, matrix)
    generator = torch.Generator().manual_seed(0)
    matrix[:, 1] *= 1e-3
    hits = sum((low_rank_factors(matrix, 1, "columns", generator=generator)[1][3].abs() > 1).item() for _ in range(50))
    assert hits >= 48


def test_factors_refuse_what_they_cannot_do():
    for keywords in ({"rank": 0}, {"rank": 1, "steps": 0}, {"rank": 1, "method": "rows"}):
        with pytest.raises(ValueError, match=r"rank|method"):
            low_rank_factors(torch.ones(3, 3), **keywords)
    with pytest.raises(ValueError, match=r"start must have shape \(3, 2\), got \(3, 1\)"):
        low_rank_factors(torch.ones(3, 3), 2, start=torch.ones(3, 1))


@pytest.mark.parametrize("shape", [(20, 20), (9, 30), (30, 9), (2, 8, 8)], ids=str)
def test_soft_polar_keeps_zero_and_reaches_one(shape):
    values = torch.ones(min(shape[-2:]), dtype=torch.float64)
    values[: len(values) // 2] = 0.02
    values[-1] = 0.0
    generator = gaussian(shape, seed=4)
    u, _, vh = torch.linalg.svd(generator, full_matrices=False)
    for scale in (1e-30, 1.0, 1e30):
        found = torch.linalg.svdvals(soft_polar(scale * (u * values) @ vh))
        assert (found[..., :-1] - 1).abs().max() <= 1e-2
        assert (found[..., -1] <= 1e-9).all()
    assert torch.equal(soft_polar(torch.zeros(shape)), torch.zeros(shape))
    with pytest.raises(ValueError, match="lowest"):
        soft_polar(torch.eye(3), 0.0)
