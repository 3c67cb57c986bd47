"""The orthogonal kernel nearest to a given one, among those that a plan can compose."""

import torch
from torch import Tensor

from orthogonium.linalg import polar
from orthogonium.linalg._precision import without_autocast
from orthogonium.parametrizations.kernel_plan import KernelPlan

_SWEEPS = 300
_GAIN = 1e-3  # share of the squared distance that a sweep must take off for another one to follow


def nearest_kernel(
    plan: KernelPlan, weight: Tensor, frames: Tensor | None = None, sweeps: int = _SWEEPS
) -> tuple[Tensor, Tensor | None]:
    """``(kernel, frames)``: the kernel that :func:`nearest_parts` finds, in the dtype of ``weight``."""
    matrix, frames = nearest_parts(plan, weight, frames, sweeps)
    return plan.assemble(polar(matrix), frames).to(weight.dtype), frames


def nearest_parts(
    plan: KernelPlan, weight: Tensor, frames: Tensor | None = None, sweeps: int = _SWEEPS
) -> tuple[Tensor, Tensor | None]:
    """A matrix, of which the polar factor is meant, and frames: no single part could bring the kernel nearer.

    All kernels of a plan have one norm, so the one nearest to ``weight`` in the Frobenius norm has the largest inner
    product with it. That product is linear in the matrix, and in each projector ``U Uᵀ``, when the others are held. So
    each part in turn has an exact optimum: the polar factor for the matrix, and for a projector the leading
    eigenvectors of a symmetric matrix. The distance never grows, and tends to a local minimum. The start is ``frames``,
    or :meth:`KernelPlan.take_apart`, which is exact for orthogonal kernels that are fed through all channels.

    Args:
        plan: how kernels are composed.
        weight: ``plan.weight_shape``, finite.
        frames: to start from, such as those of the last call for a weight that has moved little.
        sweeps: at most so many times through all parts.

    Returns:
        ``plan.matrix_shape`` and ``plan.frames_shape``, in float64.

    Source: alternating maximisation over the composition of Li et al., "Preventing gradient attenuation in Lipschitz
    constrained convolutional networks", NeurIPS 2019.
    """
    with without_autocast(weight):
        if plan.frames_shape is None:
            return plan.take_apart(weight)
        target = plan.unfold(weight.double())
        if frames is None:
            matrix, taken = plan.take_apart(weight)
            assert taken is not None
            frames = taken
        else:
            frames = frames.clone()
            matrix = plan.flatten(_taken_off(target, frames, plan.axes))
        rounding = 64 * torch.finfo(torch.float64).eps
        distance = _squared_distance(plan, matrix, frames, weight)
        for _ in range(sweeps):
            if not bool(distance > rounding**2 * weight.numel()):
                break
            matrix = _sweep(plan, target, polar(matrix), frames)
            before, distance = distance, _squared_distance(plan, matrix, frames, weight)
            if not bool(before - distance > _GAIN * distance):
                break
        return matrix, frames


def _squared_distance(plan: KernelPlan, matrix: Tensor, frames: Tensor, weight: Tensor) -> Tensor:
    return (plan.assemble(polar(matrix), frames) - weight).square().sum()


def _sweep(plan: KernelPlan, target: Tensor, matrix: Tensor, frames: Tensor) -> Tensor:
    """Renew every frame, in place, from the outermost in; returns the matrix that the rest of ``target`` asks for."""
    inner = [plan.start(matrix)]
    for frame, axis in zip(frames[:-1], plan.axes, strict=False):
        inner.append(_put_on(inner[-1], frame, axis))
    for j in range(len(plan.axes) - 1, -1, -1):
        dim, x = plan.axes[j] + 2, inner[j]
        length = x.shape[dim]
        # <P X[t] + (I − P) X[t − 1], Y> depends on P through tr(P C) with C = Σ X[t] (Y[t] − Y[t + 1])ᵀ
        change = target.narrow(dim, 0, length) - target.narrow(dim, 1, length)
        cross = x.flatten(2) @ change.flatten(2).mT
        vectors = torch.linalg.eigh(cross + cross.mT).eigenvectors
        frames[j] = vectors[..., -frames.shape[-1] :]
        target = _taken_off(target, frames[j : j + 1], plan.axes[j : j + 1])
    return plan.flatten(target)


def _put_on(x: Tensor, frame: Tensor, axis: int) -> Tensor:
    dim = axis + 2
    near = (frame @ (frame.mT @ x.flatten(2))).view_as(x)
    zero = torch.zeros_like(x.narrow(dim, 0, 1))
    return torch.cat((near, zero), dim) + torch.cat((zero, x - near), dim)


def _taken_off(y: Tensor, frames: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The adjoint of all taps, outermost first."""
    for frame, axis in zip(reversed(frames.unbind(0)), reversed(axes), strict=True):
        dim = axis + 2
        near, far = y.narrow(dim, 0, y.shape[dim] - 1), y.narrow(dim, 1, y.shape[dim] - 1)
        y = far + (frame @ (frame.mT @ (near - far).flatten(2))).view_as(far)
    return y
