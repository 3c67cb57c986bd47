"""Factors of symmetric matrices, also at sides that are enlarged on the way; inverses; products with triangles."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close

from orthogonium.linalg import orthogonality_defect
from orthogonium.linalg._constants import half_lower, identity
from orthogonium.linalg._factorizations import definite_inverse, eigenbasis, gram_factor
from orthogonium.linalg._figures import frobenius, largest, least_ratio, smallest, trace
from orthogonium.linalg._products import (
    add_roomy_product,
    lower_gram_error,
    roomy_product,
    skew_part,
    upper_times,
)
from tests.helpers import DTYPES, conditioned, contract, gaussian

SHAPES = [(5, 9), (127, 127), (128, 128), (128, 300), (3, 128, 130), (256, 256), (512, 512), (2, 512, 512)]
FEW = 4  # backward errors of these factorisations, in units of √n eps


def residual(found, expected, dtype):
    """Relative error in units of ``√n eps``, the largest over a stack."""
    error = torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)
    return float(error.max()) / (expected.shape[-1] ** 0.5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cholesky_factors(shape, dtype):
    matrix = conditioned(shape, 4.0, dtype=dtype)
    gram = matrix.double() @ matrix.double().mT
    lower = gram_factor(matrix)
    assert torch.equal(lower, lower.tril())
    assert lower.mT.is_contiguous(), "nothing of the larger matrix may be kept"
    assert residual(lower.double() @ lower.double().mT, gram, dtype) <= FEW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eigenvectors(shape, dtype):
    matrix = conditioned(shape, 4.0, dtype=torch.float64)
    gram = matrix @ matrix.mT
    values, basis = eigenbasis(gram.to(dtype))
    assert values.shape == gram.shape[:-1]
    assert basis.shape == gram.shape
    assert (values.diff() >= 0).all()
    values, basis = values.double(), basis.double()
    assert residual(basis.mT @ basis, torch.eye(gram.shape[-1], dtype=torch.float64), dtype) <= FEW
    assert residual(basis @ (values[..., None] * basis.mT), gram, dtype) <= FEW


def test_a_singular_matrix_shows_in_the_smallest_eigenvalue():
    """Among enlarging zeros, too, what :func:`least_ratio` sees of a singular matrix is no proper ratio."""
    matrix = gaussian((512, 512), seed=0)
    matrix[7] = matrix[3]
    values, _ = eigenbasis(matrix @ matrix.mT)
    assert least_ratio(values) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [0.0, 1.0, 8.0, 64.0])
@pytest.mark.parametrize(
    "shape", [(5, 5), (128, 128), (129, 129), (3, 200, 200), (2, 2, 130, 130), (512, 512)], ids=str
)
def test_inverse_by_blocks(shape, norm, dtype):
    """``2 (I − S/2)⁻¹ − I`` is orthogonal, which no error of the inverse may hide behind a large ``S``."""
    skew = skew_part(gaussian(shape))
    size = torch.linalg.matrix_norm(skew, 2, keepdim=True)
    definite = (torch.eye(shape[-1]) - 0.5 * norm / size * skew).to(dtype)
    expected = torch.linalg.inv(definite.double())
    found = definite_inverse(definite).double()
    assert residual(found, expected, dtype) <= FEW * max(1.0, norm / 8)
    cayley = 2 * found - torch.eye(shape[-1], dtype=torch.float64)
    defect = orthogonality_defect(cayley).max()
    assert defect <= max(1.0, norm / 8) * contract(definite) / 2


@pytest.mark.parametrize("shape", [(6, 9), (256, 256), (300, 310), (301, 700), (3, 256, 256)], ids=str)
def test_products_with_triangles(shape):
    right, square = gaussian(shape, seed=0), gaussian((*shape[:-1], shape[-2]), seed=1)
    assert_close(upper_times(square.triu(), right), square.triu() @ right, rtol=0, atol=1e-12)
    error = (right @ right.mT - torch.eye(shape[-2])).tril()
    assert_close(lower_gram_error(right).tril(), error, rtol=0, atol=1e-12 * shape[-1])


@pytest.mark.parametrize("shape", [(6, 6), (128, 128), (200, 200), (3, 128, 128), (2, 3, 130, 130)], ids=str)
def test_products_with_room_between_rows(shape):
    left, right = gaussian(shape, seed=0), gaussian(shape, seed=1)
    product = left @ right
    assert_close(roomy_product(left, right), product, rtol=0, atol=1e-12)
    assert_close(skew_part(roomy_product(left, right)), product - product.mT, rtol=0, atol=1e-12)
    added = add_roomy_product(left, left, right, scale=-0.5, addend_scale=2.0)
    assert_close(added, 2 * left - 0.5 * product, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (2, 3, 4, 4)], ids=str)
def test_figures(shape):
    matrix = gaussian(shape, seed=0)
    flat = matrix.reshape(-1, *shape[-2:])
    assert largest(frobenius(matrix)) == pytest.approx(max(float(m.norm()) for m in flat), rel=1e-14)
    assert smallest(trace(matrix)) == pytest.approx(min(float(m.diagonal().sum()) for m in flat), rel=1e-14)
    ascending = torch.linspace(1, 4, 5).expand(*shape[:-2], 5)
    assert least_ratio(ascending) == 0.25
    assert not least_ratio(ascending * float("nan")) >= 0
    assert not least_ratio(torch.zeros(5)) >= 0


@pytest.mark.parametrize("side", [1, 64, 128, 200])
def test_constants(side):
    like = torch.empty(0, dtype=torch.float64)
    with torch.inference_mode():
        kept = identity(side, like)
    assert torch.equal(kept, torch.eye(side, dtype=torch.float64))
    leaf = torch.ones(side, side, dtype=torch.float64, requires_grad=True)
    (leaf * kept).sum().backward()  # made in inference mode, of use outside
    mask = half_lower(side, like)
    assert (mask is None) == (side > 128)
    if mask is not None:
        ones = torch.ones(side, side, dtype=torch.float64)
        assert torch.equal(mask + mask.mT, ones)
        assert torch.equal(mask, mask.tril())


def test_what_modes_and_transforms_make_is_not_kept():
    like = torch.empty(0)
    with FakeTensorMode():
        fake = identity(37, like), half_lower(37, like)
    assert all(isinstance(t, FakeTensor) for t in fake)
    torch.func.grad(lambda x: (identity(37, x) * half_lower(37, x) * x).sum())(torch.ones(37, 37))
    for kept in (identity(37, like), half_lower(37, like)):
        assert type(kept) is torch.Tensor
        assert kept.tolist()[0][0] in (1.0, 0.5)
