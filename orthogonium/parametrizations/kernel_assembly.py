"""From an orthogonal matrix and free frames to a kernel in one differentiable step, and back in another.

Only the projectors ``U Uᵀ`` enter a kernel, so of the gradient of ``U`` nothing along the span of ``U`` itself is left,
and the way back through the orthogonalisation is shorter than for a matrix of which the columns matter.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from orthogonium.linalg import cholesky_orthogonalize
from orthogonium.linalg._gram_schmidt import _lq_backward, _lq_forward, solve_lower_transposed
from orthogonium.linalg._precision import differentiates_forward, without_autocast
from orthogonium.linalg._projector_pairs import Step, compose, compose_backward, plan_steps
from orthogonium.parametrizations.kernel_plan import KernelPlan


def kernel_of_free_frames(plan: KernelPlan, matrix: Tensor, frames: Tensor) -> Tensor:
    """The kernel, ``plan.weight_shape``, of an orthogonal matrix and frames that are yet to be orthogonalised.

    Args:
        plan: how the kernel is composed, of at least one tap.
        matrix: ``plan.matrix_shape``, float32 or float64.
        frames: ``plan.frames_shape``, likewise.

    Raises:
        NonFiniteError: NaN or Inf in ``frames``.
    """
    plain = type(matrix) in (Tensor, nn.Parameter) and type(frames) in (Tensor, nn.Parameter)
    if not plain or torch.compiler.is_compiling() or differentiates_forward():
        return _composite(plan, matrix, frames)
    kernel: Tensor = _Assembly.apply(matrix, frames, plan)
    return kernel


def _composite(plan: KernelPlan, matrix: Tensor, frames: Tensor) -> Tensor:
    """The same from differentiable parts, for second and forward derivatives and for tracers."""
    return plan.assemble(matrix, cholesky_orthogonalize(frames))


def _steps(plan: KernelPlan, like: Tensor) -> tuple[Step, ...]:
    # modes that replace tensors must not leave theirs in the cache
    make: Any = plan_steps if torch._C._len_torch_dispatch_stack() == 0 else plan_steps.__wrapped__
    steps: tuple[Step, ...] = make(plan.axes, plan.core, plan.after_core, like.dtype, like.device)
    return steps


class _Assembly(Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, frames: Tensor, plan: KernelPlan) -> Tensor:
        wide, lower, special = _lq_forward(frames.mT.flatten(0, 1), "cholesky")
        steps, left = _steps(plan, matrix), plan.after_core
        kernel, projectors, kernels, factors = compose(
            plan.positions(matrix), wide.mT.view(frames.shape), steps, left
        )
        ctx.save_for_backward(matrix, frames, wide, lower, special, projectors, *kernels, *factors)
        ctx.plan = plan
        return plan.weight_of_positions(kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, frames, wide, lower, special, projectors, *rest = ctx.saved_tensors
        plan: KernelPlan = ctx.plan
        if torch.is_grad_enabled():
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (matrix, frames)]
            with without_autocast(grad):
                value = _composite(plan, *leaves)
            found = torch.autograd.grad(value, leaves, grad, create_graph=True)
            return found[0], found[1], None
        steps = _steps(plan, matrix)
        orthonormal = wide.mT.view(frames.shape)
        kernels, factors = rest[: len(steps)], rest[len(steps) :]
        with without_autocast(grad):
            grad_start, grad_frames = compose_backward(
                plan.positions_of_weight(grad), orthonormal, projectors, kernels, factors, steps, plan.after_core
            )
            grad_wide = grad_frames.flatten(0, 1).mT
            if special.item():
                grad_free = _lq_backward(grad_wide, wide, lower, special)
            else:
                along = torch.bmm(grad_wide, wide.mT)
                grad_free = solve_lower_transposed(lower, torch.baddbmm(grad_wide, along, wide, alpha=-1))
            return plan.matrix_of_positions(grad_start), grad_free.mT.view(frames.shape), None
