"""The polar factor after a small step: the same matrix, whatever the step."""

import pytest
import torch
from torch.testing import assert_close

import orthogonium.linalg.small_step as room
from orthogonium.linalg import NonFiniteError, orthogonality_defect, polar, polar_after_step
from orthogonium.linalg._products import symmetric_product
from orthogonium.linalg.small_step import _range_of_norm
from tests.helpers import contract, gaussian, orthogonal_matrix, polar_reference, rounding

SHAPES = [(200, 200), (200, 260), (260, 200), (2, 192, 192), (2, 2, 100, 130), (420, 420), (5, 5)]


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.05, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_polar_factor_after_steps_of_any_size(shape, size):
    step = gaussian(shape, seed=2)
    step *= size / torch.linalg.matrix_norm(step, 2).amax()
    moved = (orthogonal_matrix(shape, seed=1) + step).float()
    result = polar_after_step(moved)
    assert (orthogonality_defect(result) <= contract(moved)).all()
    if size < 1:  # beyond, the factor is ill conditioned
        assert_close(result.double(), polar_reference(moved), rtol=0, atol=rounding(moved) / 10)


def test_one_direction_that_grew_alone_is_not_overlooked():
    """The Frobenius norm hardly sees it, and the probe must not be blind to it."""
    point = orthogonal_matrix((256, 256), seed=1)
    for seed in range(5):
        direction = gaussian((256, 1), seed=seed)
        direction /= direction.norm()
        for growth in (0.05, 0.3, 1.0, 5.0):
            moved = (point + growth * direction @ (direction.mT @ point)).float()
            assert orthogonality_defect(polar_after_step(moved)) <= contract(moved)


def test_small_steps_take_the_short_way_and_large_ones_fall_back(monkeypatch):
    calls = []
    monkeypatch.setattr(room, "polar_value", lambda matrix: calls.append(1) or polar(matrix))
    point = orthogonal_matrix((256, 256), dtype=torch.float32, seed=1)
    polar_after_step(point + 1e-3 * torch.sign(gaussian((256, 256), dtype=torch.float32)))
    assert not calls
    polar_after_step(gaussian((256, 256), dtype=torch.float32))
    assert calls


@pytest.mark.parametrize(
    "values", [[0.3] * 8, [-0.3, 0.3] * 4, [0.3] + [0.0] * 7, [0.3] + [0.299] * 7, [0.0] * 8], ids=str
)
def test_norms_enclose_the_largest_eigenvalue(values):
    """Equality with all values alike, and with all but one alike: what rounding takes is added, ``1e-5`` at most."""
    values = torch.tensor(values)
    least, most = _range_of_norm(8, float(values.norm()), float(values.square().norm()))
    assert least <= float(values.abs().max()) * (1 + 4 * torch.finfo(torch.float32).eps)
    assert most >= float(values.abs().max()) * (1 - 4 * torch.finfo(torch.float32).eps)


def test_matrices_of_a_batch_choose_for_themselves(monkeypatch):
    """One far matrix sends no other the long way, and each result is that of the matrix alone."""
    calls = []
    monkeypatch.setattr(room, "polar_value", lambda matrix: calls.append(matrix.shape) or polar(matrix))
    near = orthogonal_matrix((3, 200, 200), dtype=torch.float32, seed=1)
    stack = near + 1e-3 * torch.sign(gaussian((3, 200, 200), dtype=torch.float32))
    stack[1] = gaussian((200, 200), dtype=torch.float32, seed=3)
    result = polar_after_step(stack)
    assert calls == [(200, 200)]
    assert all(torch.equal(result[i], polar_after_step(stack[i])) for i in range(3))


def test_a_wrong_estimate_is_caught(monkeypatch):
    monkeypatch.setattr(room, "_largest", lambda square, size: 1e-6)  # claims that nothing is left to do
    moved = orthogonal_matrix((256, 256), dtype=torch.float32, seed=1)
    moved = moved + 3e-3 * torch.sign(gaussian((256, 256), dtype=torch.float32))
    assert orthogonality_defect(polar_after_step(moved)) <= contract(moved)


@pytest.mark.parametrize("side", [3, 383, 384, 385, 800])
def test_symmetric_products_are_products(side):
    matrix = gaussian((side, 20), seed=1)
    assert_close(symmetric_product(matrix, matrix.mT), matrix @ matrix.mT, rtol=0, atol=1e-12)
    stack = gaussian((2, side, 5), seed=2)
    assert_close(symmetric_product(stack, stack.mT), stack @ stack.mT, rtol=0, atol=1e-12)


def test_nothing_is_recorded_and_bad_entries_are_named():
    leaf = orthogonal_matrix((200, 200), dtype=torch.float32).requires_grad_()
    assert not polar_after_step(leaf).requires_grad
    with pytest.raises(NonFiniteError):
        polar_after_step(torch.full((200, 200), torch.nan))
    half = (1.01 * orthogonal_matrix((200, 200))).bfloat16()
    assert torch.equal(polar_after_step(half), polar_after_step(half.float()).bfloat16())


def test_the_default_type_does_not_matter():
    moved = (orthogonal_matrix((2, 128, 128)) + 1e-3).float()
    expected = polar_after_step(moved)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(polar_after_step(moved), expected)
    finally:
        torch.set_default_dtype(torch.float32)
