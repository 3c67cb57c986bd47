"""The orthogonal kernel nearest to a given one, among those that a plan can compose."""

import torch
from torch import Tensor

from orthogonium.linalg import polar
from orthogonium.linalg._precision import without_autocast
from orthogonium.parametrizations.kernel import KernelPlan

_SWEEPS = 30
_GAIN = 1e-6  # of the overlap, relative, below which sweeping stops


def nearest_kernel(
    plan: KernelPlan, weight: Tensor, frames: Tensor | None = None, sweeps: int = _SWEEPS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """An orthogonal kernel that no single part of it could bring closer to ``weight`` in the Frobenius norm.

    All kernels of a plan have one norm, so the nearest has the largest inner product with ``weight``. That product is
    linear in the matrix, and in each projector ``U Uᵀ`` when the others are held. So each part in turn has an exact
    optimum: the polar factor for the matrix, and for a projector the leading eigenvectors of a symmetric matrix. The
    distance never grows; it converges to a local minimum, started from ``frames`` or from
    :meth:`~orthogonium.parametrizations.KernelPlan.take_apart`, which is exact for orthogonal kernels.

    Args:
        plan: how kernels are composed.
        weight: ``plan.weight_shape``.
        frames: to start from, such as those of the last call for a weight that has moved little.
        sweeps: at most so many times through all parts.

    Returns:
        The kernel, ``plan.weight_shape`` in ``weight``'s dtype, and the matrix and frames that make it, in float64.

    Source: alternating maximisation over the composition of Li et al., "Preventing gradient attenuation in Lipschitz
    constrained convolutional networks", NeurIPS 2019.
    """
    with without_autocast(weight):
        if plan.frames_shape is None:
            matrix = polar(plan.take_apart(weight)[0])
            return plan.assemble(matrix, None).to(weight.dtype), matrix, None
        target = plan.unfold(weight.double())
        if frames is None:
            first, taken = plan.take_apart(weight)
            assert taken is not None
            frames, matrix = taken, polar(first)
        else:
            frames = frames.clone()
            matrix = polar(plan.flatten(_taken_off(target, frames, plan.axes)))
        overlap = torch.zeros((), dtype=torch.float64, device=weight.device)
        for _ in range(sweeps):
            core = _sweep(plan, target, matrix, frames)
            matrix = polar(core)
            previous, overlap = overlap, (matrix * core).sum()
            if not bool(overlap - previous > _GAIN * overlap):
                break
        return plan.assemble(matrix, frames).to(weight.dtype), matrix, frames


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
