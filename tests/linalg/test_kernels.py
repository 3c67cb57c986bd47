import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from orthogonium.linalg import adjoint_kernel, compose_kernels, identity_kernel, multiply_by_projector_taps

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_composition_is_one_convolution_after_another(dims, groups):
    outer, inner = randn(6, 8 // groups, *(3, 2, 1)[:dims]), randn(8, 4 // groups, *(2, 4, 2)[:dims], seed=1)
    x = randn(2, 4, *(9, 8, 7)[:dims], seed=2)
    for stride in (1, 2):
        steps = CONV[dims](CONV[dims](x, inner, stride=stride, groups=groups), outer, groups=groups)
        once = CONV[dims](x, compose_kernels(outer, inner, groups, stride), stride=stride, groups=groups)
        assert_close(once, steps)


def test_composition_needs_matching_channels():
    with pytest.raises(ValueError, match="outer reads 3 x 1 groups of channels and inner writes 4"):
        compose_kernels(torch.ones(2, 3, 1, 1), torch.ones(4, 2, 1, 1))


def test_adjoint_and_identity():
    kernel = randn(6, 2, 3, 3)
    x, y = randn(1, 4, 7, 7, seed=1), randn(1, 6, 7, 7, seed=2)
    forward = F.conv2d(x, kernel, padding=1, groups=2)
    back = F.conv2d(y, adjoint_kernel(kernel, groups=2), padding=1, groups=2)
    assert_close((forward * y).sum(), (x * back).sum())
    same = identity_kernel(4, (3, 3), groups=2, dtype=torch.float64)
    assert_close(F.conv2d(x, same, padding=1, groups=2), x)


def dense_taps(start, frames, axes):
    """With projectors formed and composed by the general rule."""
    groups, c, *sides, _ = start.shape
    kernels = []
    for g in range(groups):
        kernel = start[g].movedim(-1, 1)
        for frame, axis in zip(frames[:, g], axes, strict=True):
            projector = frame @ frame.T
            shape = [2 if i == axis else 1 for i in range(len(sides))]
            taps = torch.stack((projector, torch.eye(c, dtype=frame.dtype) - projector), -1)
            kernel = compose_kernels(taps.view(c, c, *shape), kernel)
        kernels.append(kernel.movedim(1, -1))
    return torch.stack(kernels)


@pytest.mark.parametrize("axes", [(0,), (0, 0, 1), (1, 0, 1, 1)])
def test_projector_taps_are_a_composition(axes):
    start, frames = randn(2, 5, 2, 1, 3), randn(len(axes), 2, 5, 2, seed=1)
    assert_close(multiply_by_projector_taps(start, frames, axes), dense_taps(start, frames, axes))


def test_projector_taps_derivatives():
    start, frames = randn(2, 4, 2, 1, 3).requires_grad_(), randn(3, 2, 4, 2, seed=1).requires_grad_()
    run = lambda start, frames: multiply_by_projector_taps(start, frames, (0, 1, 1))  # noqa: E731
    assert gradcheck(run, (start, frames))
    assert gradgradcheck(run, (start, frames))
    jacobian = torch.func.jacrev(run, argnums=1)(start, frames)
    (reference,) = torch.autograd.grad((run(start, frames) * randn(2, 4, 3, 3, 3, seed=5)).sum(), frames)
    assert_close(
        (jacobian.flatten(5) * randn(2, 4, 3, 3, 3, seed=5)[..., None]).sum((0, 1, 2, 3, 4)).view_as(frames),
        reference,
    )
