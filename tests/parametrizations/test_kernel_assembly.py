"""Kernels in one step against the same composition tap by tap."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from orthogonium.linalg import _projector_pairs, cholesky_orthogonalize
from orthogonium.parametrizations.kernel_assembly import kernel_of_free_frames
from orthogonium.parametrizations.kernel_plan import KernelPlan

CHANNELS = [(6, 4), (4, 6), (4, 4), (9, 2), (2, 9), (12, 3)]
KERNELS = [(3,), (5,), (2, 4), (3, 3), (4, 3), (1, 3), (3, 2, 2), (3, 3, 3), (5, 5)]
PLANS = [
    KernelPlan(out, inner, k, tuple(min(s, side) for side in k), groups)
    for (out, inner), k, s, groups in itertools.product(CHANNELS, KERNELS, (1, 2), (1, 3))
]
PLANS = [plan for plan in PLANS if plan.frames_shape is not None]
# how far frames are from orthonormal: the short series, the long one, and Cholesky take over one after the other
NEAR = {torch.float64: [0.0, 1e-9, 2e-7, 1.0], torch.float32: [0.0, 1e-6, 1e-4, 1.0]}


@pytest.fixture(params=["by taps where possible", "by pairs"])
def either_way(request, monkeypatch):
    """How kernels are composed of which each axis has one step."""
    monkeypatch.setattr(_projector_pairs, "_FEW_CHANNELS", 64 if request.param == "by taps where possible" else 0)
    return request.param


def parts(plan, error=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    frames = torch.linalg.qr(draw(plan.frames_shape)).Q + error * draw(plan.frames_shape)
    matrix, direction = draw(plan.matrix_shape), draw(plan.weight_shape)
    return matrix.to(dtype).requires_grad_(), frames.to(dtype).requires_grad_(), direction.to(dtype)


def tap_by_tap(plan, matrix, frames):
    return plan.assemble(matrix, cholesky_orthogonalize(frames))


@pytest.mark.parametrize("error", NEAR[torch.float64])
@pytest.mark.usefixtures("either_way")
def test_kernel_and_gradients_are_those_of_the_composition(error):
    for plan in PLANS:
        matrix, frames, direction = parts(plan, error)
        kernel, expected = kernel_of_free_frames(plan, matrix, frames), tap_by_tap(plan, matrix, frames)
        assert kernel.is_contiguous()
        assert_close(kernel, expected, rtol=0, atol=1e-12, msg=str(plan))
        found = torch.autograd.grad(kernel, (matrix, frames), direction)
        reference = torch.autograd.grad(expected, (matrix, frames), direction)
        assert_close(found, reference, rtol=1e-10, atol=1e-11, msg=str(plan))


@pytest.mark.parametrize("error", NEAR[torch.float32])
@pytest.mark.parametrize("plan", [KernelPlan(16, 16, (3, 3), (1, 1)), KernelPlan(8, 8, (5, 4), (2, 1), 2)], ids=str)
@pytest.mark.usefixtures("either_way")
def test_rounding_in_float32(plan, error):
    matrix, frames, direction = parts(plan, error, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (matrix, frames)]
    kernel, expected = kernel_of_free_frames(plan, matrix, frames), tap_by_tap(plan, *wide)
    eps = torch.finfo(torch.float32).eps
    assert_close(kernel.double(), expected, rtol=0, atol=64 * eps * float(expected.detach().abs().max()))
    found = torch.autograd.grad(kernel, (matrix, frames), direction)
    for gradient, reference in zip(found, torch.autograd.grad(expected, wide, direction.double()), strict=True):
        # frames far from orthonormal have a condition number, which multiplies rounding
        scale = float(reference.abs().max()) * (1 if error < 1 else float(torch.linalg.cond(wide[1].detach()).max()))
        assert_close(gradient.double(), reference, rtol=0, atol=128 * eps * scale)


def test_which_way_is_taken(either_way):
    def by_taps(plan):
        arguments = (plan.axes, plan.core, plan.groups, plan.middle, plan.after_core)
        return _projector_pairs.plan_steps(*arguments, torch.float32, torch.device("cpu")).by_taps

    taken = either_way != "by pairs"
    for kernel in [(3,), (2,), (3, 3), (2, 3), (1, 3), (3, 3, 3)]:
        assert by_taps(KernelPlan(8, 8, kernel, (1,) * len(kernel))) is taken, f"{kernel}"
    for kernel, stride in [((5,), (1,)), ((3, 4), (1, 1)), ((3, 3), (2, 1)), ((3, 3), (2, 2))]:
        assert not by_taps(KernelPlan(8, 8, kernel, stride)), f"{kernel}, {stride}"
    assert not by_taps(KernelPlan(64, 64, (3, 3), (1, 1)))


@pytest.mark.parametrize("error", NEAR[torch.float64])
@pytest.mark.usefixtures("either_way")
def test_derivatives_of_both_orders(error):
    for plan in (KernelPlan(4, 2, (3, 2), (1, 1)), KernelPlan(2, 4, (3, 3), (2, 1), 2)):
        matrix, frames, _ = parts(plan, error)
        run = lambda matrix, frames, plan=plan: kernel_of_free_frames(plan, matrix, frames)  # noqa: E731
        assert gradcheck(run, (matrix, frames))
        assert gradgradcheck(run, (matrix, frames))


def test_one_gradient_alone():
    plan = KernelPlan(4, 4, (3, 3), (1, 1))
    matrix, frames, direction = parts(plan)
    both = torch.autograd.grad(kernel_of_free_frames(plan, matrix, frames), (matrix, frames), direction)
    for held, moving, expected in (("frames", matrix, both[0]), ("matrix", frames, both[1])):
        given = (matrix, frames.detach()) if held == "frames" else (matrix.detach(), frames)
        kernel = kernel_of_free_frames(plan, *given)
        assert torch.equal(torch.autograd.grad(kernel, moving, direction)[0], expected)


def test_transforms():
    plan = KernelPlan(4, 2, (3, 2), (1, 1))
    matrix, frames, direction = parts(plan)
    run = lambda frames: (kernel_of_free_frames(plan, matrix.detach(), frames) * direction).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(run(frames), frames)
    assert_close(torch.func.jacrev(run)(frames.detach()), expected)
    tangent = torch.ones_like(frames)
    assert_close(torch.func.jvp(run, (frames.detach(),), (tangent,))[1], (expected * tangent).sum())
    many = torch.stack([matrix.detach(), 2 * matrix.detach()])
    kernels = torch.func.vmap(lambda m: kernel_of_free_frames(plan, m, frames.detach()))(many)
    assert_close(kernels[1], 2 * kernel_of_free_frames(plan, matrix, frames).detach())


@pytest.mark.parametrize("scale", [1.0, 1e30, 0.0])
def test_dependent_frames_are_completed(scale):
    plan = KernelPlan(6, 6, (3, 3), (1, 1))
    matrix, frames, direction = parts(plan, dtype=torch.float32)
    with torch.no_grad():
        frames[0, 0, :, 1] = frames[0, 0, :, 0]
        frames[1] *= scale
    kernel = kernel_of_free_frames(plan, matrix, frames)
    eps = torch.finfo(torch.float32).eps
    assert_close(kernel, tap_by_tap(plan, matrix, frames), rtol=0, atol=64 * eps * float(matrix.detach().abs().max()))
    gradients = torch.autograd.grad(kernel, (matrix, frames), direction)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_the_same_bits_again_and_any_layout():
    plan = KernelPlan(9, 2, (3, 3), (2, 2))
    matrix, frames, direction = parts(plan, dtype=torch.float32)
    turned = matrix.detach().mT.contiguous().mT.requires_grad_()
    kernel = kernel_of_free_frames(plan, matrix, frames)
    assert torch.equal(kernel, kernel_of_free_frames(plan, turned, frames))
    strided = direction.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    first = torch.autograd.grad(kernel, (matrix, frames), direction)
    again = torch.autograd.grad(kernel_of_free_frames(plan, turned, frames), (turned, frames), strided)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_inference_leaves_in_the_cache_serves_training():
    plan = KernelPlan(7, 5, (4, 3), (1, 1))  # a plan that no other test has
    matrix, frames, _ = parts(plan)
    with torch.inference_mode():
        kernel_of_free_frames(plan, matrix, frames)
    kernel = kernel_of_free_frames(plan, matrix, frames)
    assert_close(kernel, tap_by_tap(plan, matrix, frames))
    kernel.sum().backward()
