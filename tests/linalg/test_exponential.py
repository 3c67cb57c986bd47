"""Exponential and Cayley maps against the dense series and ``torch.linalg.solve`` in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from orthogonium.linalg import orthogonality_defect, skew_frame
from orthogonium.linalg._exponential_steps import expm, expm_reverse, squarings_for
from orthogonium.linalg._skew_spectral import spectral_gradient, spectral_map
from tests.helpers import DTYPES, contract, dense_exponential, gaussian, orthogonal_matrix

KINDS = ["exponential", "cayley"]
TALL = [(1, 1), (4, 4), (7, 3), (2, 5, 2), (3, 1), (2, 3, 4, 4)]


def generator(free, base):
    """The full skew matrix: ``X − Xᵀ`` in the frame's own coordinates, if square."""
    if free.shape[-1] == free.shape[-2]:
        product = base @ free @ base.mT
    else:
        product = free @ base.mT
    return product - product.mT


def dense(free, base, kind):
    skew = generator(free, base)
    if kind == "exponential":
        return dense_exponential(skew) @ base
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(identity - skew / 2, (identity + skew / 2) @ base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 0.1, 1.0, 10.0], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_dense_matrices(kind, scale, dtype):
    for shape in TALL:
        free, base = scale * gaussian(shape, dtype=dtype), orthogonal_matrix(shape, dtype=dtype, seed=1)
        found = skew_frame(free, base, kind)
        expected = dense(free.double(), base.double(), kind)
        angle = torch.linalg.matrix_norm(generator(free.double(), base.double()), ord=2).max().item()
        bound = 30 * torch.finfo(dtype).eps * max(1.0, angle) * shape[-1] ** 0.5
        assert (found - expected).abs().max() <= bound, f"{shape}"
        assert orthogonality_defect(found).max() <= contract(found)
        if shape[-1] < shape[-2]:
            assert torch.equal(skew_frame(free.mT, base.mT, kind), found.mT)


@pytest.mark.parametrize("norm", [1.0, 31.0, 33.0, 63.0, 65.0])
@pytest.mark.parametrize("rank", [1, 128])
def test_cayley_maps_of_large_sides(rank, norm):
    """Inverted by blocks, not polished while the norm is known to be small, and by the spectrum where it is not."""
    shape, dtype = (160, 160), torch.float32
    free = gaussian((160, rank)) @ gaussian((rank, 160), seed=1)
    free *= norm / torch.linalg.matrix_norm(free - free.mT, 2)
    base, grad = orthogonal_matrix(shape, seed=2), gaussian(shape, seed=3)
    narrow = free.to(dtype).requires_grad_()
    found = skew_frame(narrow, base.to(dtype), "cayley")
    assert orthogonality_defect(found.detach()).max() <= contract(found)
    wide = narrow.detach().double().requires_grad_()
    expected = dense(wide, base, "cayley")
    rounding = 10 * torch.finfo(dtype).eps * norm
    assert (found - expected).abs().max() <= rounding
    (gradient,) = torch.autograd.grad(found, narrow, grad.to(dtype))
    (reference,) = torch.autograd.grad(expected, wide, grad)
    assert torch.linalg.matrix_norm(gradient - reference) <= rounding * torch.linalg.matrix_norm(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gives_the_frame(kind):
    for shape in TALL:
        base = orthogonal_matrix(shape)
        torch.testing.assert_close(
            skew_frame(torch.zeros(shape, dtype=torch.float64), base, kind), base, rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e30, 1e300], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_huge_arguments_stay_orthogonal(kind, scale):
    for shape in TALL:
        free = (scale * gaussian(shape)).requires_grad_()
        q = skew_frame(free, orthogonal_matrix(shape, seed=1), kind)
        assert orthogonality_defect(q.detach()).max() <= contract(q)
        q.sum().backward()
        assert free.grad.isfinite().all()


def test_every_rotation_is_reached():
    """A rotation by more than one radian in every plane, which a truncated series would miss."""
    for angle in (1.0, 3.0, math.pi, 6.0):
        free = torch.tensor([[0.0, -angle / 2], [angle / 2, 0.0]], dtype=torch.float64)
        cosine, sine = math.cos(angle), math.sin(angle)
        expected = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
        found = skew_frame(free, torch.eye(2, dtype=torch.float64), "exponential")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_training_reaches_a_far_target():
    torch.manual_seed(0)
    target = torch.linalg.qr(gaussian((8, 8))).Q
    if torch.linalg.det(target) < 0:
        target[:, 0] *= -1
    free = (1e-2 * gaussian((8, 8), seed=1)).requires_grad_()
    optimizer = torch.optim.Adam([free], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (skew_frame(free, torch.eye(8, dtype=torch.float64), "exponential") - target).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=st.integers(1, 8), scale=st.floats(0.0, 20.0), seed=st.integers(0, 999))
def test_expm(dtype, size, scale, seed):
    matrix = gaussian((2, size, size), seed=seed)
    matrix = scale * (matrix - matrix.mT) / size**0.5
    norm = torch.linalg.matrix_norm(matrix, ord=2).max().item()
    found = expm(matrix.to(dtype), squarings_for(norm, dtype))
    error = (found - dense_exponential(matrix.to(dtype))).abs().max()
    assert error <= 60 * torch.finfo(dtype).eps * max(1.0, norm)


@given(size=st.integers(1, 6), scale=st.floats(0.0, 10.0), seed=st.integers(0, 999))
def test_expm_reverse(size, scale, seed):
    """The hand-written reverse against autograd through the dense exponential, for matrices of every kind."""
    matrix = (scale * gaussian((size, size), seed=seed) / size).requires_grad_()
    grad = gaussian((size, size), seed=seed + 1)
    norm = torch.linalg.matrix_norm(matrix, ord=2).item()
    found, value = expm_reverse(matrix.detach(), squarings_for(norm, torch.float64), grad)
    reference = dense_exponential(matrix)
    (expected,) = torch.autograd.grad(reference, matrix, grad)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * max(1.0, expected.abs().max().item()))
    size = reference.detach().abs().max().clamp_min(1.0).item()  # what `expm` promises: it is made for skew matrices
    torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectral_way_agrees_with_products(kind):
    for shape in TALL:
        free, base, grad = gaussian(shape), orthogonal_matrix(shape, seed=1), gaussian(shape, seed=2)
        leaf = free.clone().requires_grad_()
        value = dense(leaf, base, kind)
        (expected,) = torch.autograd.grad(value, leaf, grad)
        torch.testing.assert_close(spectral_map(free, base, kind), value.detach(), rtol=0, atol=1e-13)
        torch.testing.assert_close(spectral_gradient(grad, free, base, kind), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dependent_columns_outside_the_frame(kind):
    """The thin coordinates are smooth where ``X₂`` has no rank: no QR of it is taken."""
    base = torch.eye(6, 2, dtype=torch.float64)
    free = torch.zeros(6, 2, dtype=torch.float64)
    free[4] = 1.0
    assert gradcheck(lambda x: skew_frame(x, base, kind), free.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number(kind):
    with pytest.raises(ValueError, match="NaN or Inf in 9 of 9"):
        skew_frame(torch.full((3, 3), torch.nan), torch.eye(3), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(kind, dtype):
    free, base = gaussian((5, 5)).to(dtype), torch.eye(5)
    expected = skew_frame(free.float(), base, kind).to(dtype)
    assert torch.equal(skew_frame(free, base.to(dtype), kind), expected)


def test_refusals():
    free, base = gaussian((4, 2)), orthogonal_matrix((4, 2))
    with pytest.raises(ValueError, match="kind must be"):
        skew_frame(free, base, "expm")
    with pytest.raises(ValueError, match=r"sides of free, \(4, 2\), got \(4, 4\)"):
        skew_frame(free, torch.eye(4), "cayley")
