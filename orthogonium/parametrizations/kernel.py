"""An orthogonal convolution kernel of any size, stride and groups from one matrix and a few projectors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orthogonium.linalg import NonFiniteError, qr_orthogonalize
from orthogonium.linalg._precision import in_dtype, without_autocast, working_dtype
from orthogonium.parametrizations._evaluation import ComputeWithReverse, Reverse
from orthogonium.parametrizations.closed_form import closed_form
from orthogonium.parametrizations.kernel_assembly import kernel_of_free_frames, kernel_with_pullback
from orthogonium.parametrizations.kernel_plan import KernelPlan
from orthogonium.parametrizations.kernel_projection import nearest_parts

__all__ = ["KernelPlan", "OrthogonalKernel", "draw_parts"]


class OrthogonalKernel(nn.Module):
    """Free tensors to an orthogonal kernel: the hook behind the orthogonal convolutions.

    The free matrix goes through ``matrix_hook``, the preset's orthogonaliser. The free frames are orthogonalised in one
    batch by verified Cholesky whatever the preset, since the kernel depends on their span alone, which every method
    keeps.

    Args:
        plan: how the kernel is composed.
        matrix_hook: orthogonaliser for ``plan.matrix_shape``.
    """

    def __init__(self, plan: KernelPlan, matrix_hook: nn.Module) -> None:
        super().__init__()
        self.plan, self.matrix_hook = plan, matrix_hook
        self._draws = False

    @property
    def scale_invariant(self) -> bool:
        return bool(getattr(self.matrix_hook, "scale_invariant", False))

    def forward(self, matrix: Tensor, frames: Tensor | None = None) -> Tensor:
        dtype = matrix.dtype
        if dtype not in (torch.float32, torch.float64):
            matrix, frames = matrix.float(), None if frames is None else frames.float()
        with without_autocast(matrix):
            orthogonal = self.matrix_hook(matrix)
            if frames is None:
                return self.plan.assemble(orthogonal, None).to(dtype)
            try:
                return kernel_of_free_frames(self.plan, orthogonal, frames).to(dtype)
            except NonFiniteError as error:
                raise _of_frames(error) from None

    def closed_form(self) -> ComputeWithReverse | None:
        """See :func:`orthogonium.parametrizations.closed_form.closed_form`."""
        of_matrix = closed_form(self.matrix_hook)
        if of_matrix is None or self.plan.only_shifts:
            return None

        def compute(free: list[Tensor]) -> tuple[list[Tensor], Reverse]:
            dtype = free[0].dtype
            work = working_dtype(dtype)
            (orthogonal,), matrix_reverse = of_matrix([in_dtype(free[0], work)])
            back: Callable[[Tensor], tuple[Tensor, ...]]
            if len(free) == 1:
                kernel = orthogonal.reshape(self.plan.weight_shape)
                back = self._of_matrix_alone
            else:
                try:
                    with without_autocast(orthogonal):
                        kernel, back = kernel_with_pullback(self.plan, orthogonal, in_dtype(free[1], work))
                except NonFiniteError as error:
                    raise _of_frames(error) from None

            def reverse(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
                if grads[0] is None:
                    return [None] * len(free)
                grad_matrix, *grad_frames = back(in_dtype(grads[0], work))
                found = (*matrix_reverse([grad_matrix]), *grad_frames)
                return [None if grad is None else in_dtype(grad, dtype) for grad in found]

            return [in_dtype(kernel, dtype)], reverse

        return compute

    def _of_matrix_alone(self, grad: Tensor) -> tuple[Tensor]:
        return (grad.reshape(self.plan.matrix_shape),)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, :meth:`right_inverse` draws matrix and frames uniformly instead of taking the weight's."""
        self._draws = True
        try:
            yield
        finally:
            self._draws = False

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Free tensors for ``weight``, or for the orthogonal kernel nearest to it; see :func:`nearest_parts`.

        Raises:
            ValueError: another shape, or NaN or Inf.
        """
        if self._draws:
            parts = self._draw(weight)
        else:
            parts = self._parts_of(weight)
        matrix, frames = (part if part is None else part.to(weight.dtype) for part in parts)
        assert matrix is not None
        inverse = getattr(self.matrix_hook, "right_inverse", None)
        free = matrix if inverse is None else inverse(matrix)
        return free if frames is None else (free, frames)

    def _parts_of(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if tuple(weight.shape) != self.plan.weight_shape:
            raise ValueError(f"weight must have shape {self.plan.weight_shape}, got {tuple(weight.shape)}")
        if weight.is_meta:
            return self._empty(weight)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"weight of shape {tuple(weight.shape)} holds NaN or Inf")
        return nearest_parts(self.plan, weight)

    def _empty(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = self.plan.frames_shape
        return like.new_empty(self.plan.matrix_shape), None if shape is None else like.new_empty(shape)

    def _draw(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        if like.is_meta:
            return self._empty(like)
        return draw_parts(self.plan, like.device, like.dtype)

    def extra_repr(self) -> str:
        return f"{self.plan.weight_shape}, stride={self.plan.stride}, groups={self.plan.groups}"


def draw_parts(
    plan: KernelPlan,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """An orthogonal matrix and orthonormal frames, uniformly distributed (Haar), in float32 at least."""
    work = working_dtype(dtype)

    def haar(shape: Sequence[int]) -> Tensor:
        return qr_orthogonalize(torch.randn(*shape, generator=generator, device=device, dtype=work))

    matrix = haar(plan.matrix_shape)
    return matrix, None if plan.frames_shape is None else haar(plan.frames_shape)


def _of_frames(error: NonFiniteError) -> NonFiniteError:
    return NonFiniteError(f"{error} (the free frames behind the kernel)")
