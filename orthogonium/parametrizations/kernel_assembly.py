"""From an orthogonal matrix and free frames to a kernel in one differentiable step, and back in another.

Only the projectors ``U Uᵀ`` enter a kernel, so of the gradient of ``U`` nothing along the span of ``U`` itself is left,
and the way back through the orthogonalisation is shorter than for a matrix of which the columns matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from orthogonium.linalg import cholesky_orthogonalize
from orthogonium.linalg._precision import differentiates_forward, is_vectorized, without_autocast
from orthogonium.linalg._projector_pairs import Steps, compose, compose_backward, plan_steps
from orthogonium.linalg._spans import Spans, spans_backward, spans_of
from orthogonium.linalg._tap_products import compose_taps, compose_taps_backward
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


class _Parts(NamedTuple):
    """What the way back needs."""

    steps: Steps
    frames: torch.Size
    spans: Spans
    kept: list[Tensor]


def _assemble(plan: KernelPlan, matrix: Tensor, frames: Tensor) -> tuple[Tensor, _Parts]:
    steps = plan_steps(plan.axes, plan.core, plan.groups, plan.middle, plan.after_core, matrix.dtype, matrix.device)
    ordered = frames if steps.order is None else frames.index_select(0, steps.order)
    spans = spans_of(ordered.flatten(0, 1).mT)
    forward = compose_taps if steps.by_taps else compose
    kernel, kept = forward(plan.positions(matrix), spans.projectors, steps)
    return plan.weight_of_positions(kernel), _Parts(steps, frames.shape, spans, kept)


def _assemble_backward(grad: Tensor, plan: KernelPlan, parts: _Parts) -> tuple[Tensor, Tensor]:
    """The gradients of matrix and frames."""
    steps, spans = parts.steps, parts.spans
    reverse = compose_taps_backward if steps.by_taps else compose_backward
    with without_autocast(grad):
        grad_start, of_projectors = reverse(plan.positions_of_weight(grad), spans.projectors, steps, parts.kept)
        grad_frames = spans_backward(of_projectors, spans).mT.reshape(parts.frames)
    if steps.inverse_order is not None:
        grad_frames = grad_frames.index_select(0, steps.inverse_order)
    return plan.matrix_of_positions(grad_start), grad_frames


def kernel_with_pullback(
    plan: KernelPlan, matrix: Tensor, frames: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """:func:`kernel_of_free_frames`, and the map from its gradient to those of ``matrix`` and ``frames``."""
    kernel, parts = _assemble(plan, matrix, frames)
    return kernel, lambda grad: _assemble_backward(grad, plan, parts)


class _Assembly(Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, frames: Tensor, plan: KernelPlan) -> Tensor:
        kernel, (ctx.steps, ctx.shape, spans, kept) = _assemble(plan, matrix, frames)
        ctx.save_for_backward(matrix, frames, *spans, *kept)
        ctx.plan = plan
        return kernel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, frames, projectors, basis, lower, special, *kept = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or is_vectorized(grad):
            leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (matrix, frames)]
            with without_autocast(grad), torch.enable_grad():
                value = _composite(ctx.plan, *leaves)
            found = torch.autograd.grad(value, leaves, grad, create_graph=again)
            return found[0], found[1], None
        parts = _Parts(ctx.steps, ctx.shape, Spans(projectors, basis, lower, special), kept)
        return *_assemble_backward(grad, ctx.plan, parts), None
