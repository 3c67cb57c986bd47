"""At singular matrices the derivative is a convention: every way to ask for it has to give the same one."""

import pytest
import torch

from orthogonium.linalg import cholesky_orthogonalize, polar, polar_by_svd, qr_orthogonalize
from tests.helpers import gaussian

SHAPES = [(3, 5), (5, 3), (4, 4), (4, 30), (3, 1), (2, 4, 6)]
STARTS = ["dependent", "zero", "mixed"]


def singular(shape, start):
    wide = shape[-2] <= shape[-1]
    matrix = gaussian(shape if wide else (*shape[:-2], shape[-1], shape[-2]))
    if start == "zero":
        matrix.zero_()
    if start != "zero" and matrix.shape[-2] > 1:
        matrix[..., -1, :] = matrix[..., 0, :]
    if start == "mixed":
        matrix = torch.stack((torch.zeros_like(matrix), matrix, gaussian(matrix.shape, seed=3)))
    return matrix if wide else matrix.mT.contiguous()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [polar, polar_by_svd, cholesky_orthogonalize, qr_orthogonalize])
def test_every_way_to_the_derivative_agrees(function, shape, start):
    matrix = singular(shape, start).requires_grad_()
    grad, tangent = gaussian(matrix.shape, seed=1), gaussian(matrix.shape, seed=2)
    (plain,) = torch.autograd.grad(function(matrix), matrix, grad)
    (again,) = torch.autograd.grad(function(matrix), matrix, grad, create_graph=True)
    still = matrix.detach()
    functional = torch.func.grad(lambda w: (function(w) * grad).sum())
    _, moved = torch.func.jvp(function, (still,), (tangent,))
    vectorized = torch.vmap(functional)(torch.stack((still, still)))[1]
    assert plain.norm() < 1e3  # null to rounding counts as null
    for found in (again.detach(), functional(still), vectorized):
        torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close((moved * grad).sum(), (plain * tangent).sum(), rtol=1e-8, atol=1e-10)
    (second,) = torch.autograd.grad((again * tangent).sum(), matrix)
    assert second.isfinite().all()
