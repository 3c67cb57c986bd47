"""An orthogonal convolution kernel of any size, stride and groups from one matrix and a few projectors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from orthogonium.linalg import NonFiniteError, cholesky_orthogonalize, qr_orthogonalize
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg.kernels import multiply_by_projector_taps


@dataclass(frozen=True)
class KernelPlan:
    """How a kernel is composed: a matrix, reshaped to the *core* kernel, and two-tap kernels ``[U Uᵀ, I − U Uᵀ]``.

    The core is as large as the stride, so that its windows tile the image and a semi-orthogonal matrix is all it needs.
    The taps act at stride one on ``middle`` channels: before the core ("in" side), or after it ("out" side) when the
    core is 1×1 and adds channels. With more outputs than the core's windows hold inputs, there are ``middle = out // Π
    core`` channels, of which the first ``in`` are fed: an isometry all along, never a contraction followed by an
    expansion.

    Args:
        out_channels, in_channels: of one group.
        kernel_size, stride: per axis.
        groups: how many independent kernels.
    """

    out_channels: int
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int = 1

    @property
    def core(self) -> tuple[int, ...]:
        return tuple(min(k, s) for k, s in zip(self.kernel_size, self.stride, strict=True))

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of each two-tap kernel."""
        pairs = zip(self.kernel_size, self.core, strict=True)
        return tuple(axis for axis, (k, core) in enumerate(pairs) for _ in range(k - core))

    @property
    def after_core(self) -> bool:
        return prod(self.core) == 1 and self.out_channels >= self.in_channels

    @property
    def middle(self) -> int:
        if self.after_core:
            return self.out_channels
        return max(self.in_channels, self.out_channels // prod(self.core)) if self.axes else self.in_channels

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(groups, rows, columns)``, without ``groups`` where there is one."""
        columns = self.in_channels if self.after_core else self.middle * prod(self.core)
        return (*((self.groups,) if self.groups > 1 else ()), self.out_channels, columns)

    @property
    def frames_shape(self) -> tuple[int, ...] | None:
        """``(taps, groups, middle, middle // 2)``; ``None`` without taps, and for one channel, only shifted."""
        rank = self.middle // 2
        return (len(self.axes), self.groups, self.middle, rank) if self.axes and rank else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.groups * self.out_channels, self.in_channels, *self.kernel_size)

    def assemble(self, matrix: Tensor, frames: Tensor | None) -> Tensor:
        """The kernel, ``weight_shape``, of an orthogonal matrix and orthonormal frames."""
        if not self.axes:
            return matrix.reshape(self.weight_shape)
        start = self.start(matrix)
        if frames is None:
            kernel = self._centred(start)
        else:
            kernel = multiply_by_projector_taps(start, frames, self.axes)
        if self.after_core:
            kernel = kernel.movedim(-1, 2)
        else:
            kernel = kernel[:, : self.in_channels].movedim(-1, 1)
        return kernel.reshape(self.weight_shape)

    def _centred(self, start: Tensor) -> Tensor:
        margins: list[int] = [0, 0]
        for k, core in zip(reversed(self.kernel_size), reversed(self.core), strict=True):
            margins += [(k - core) // 2, k - core - (k - core) // 2]
        return nn.functional.pad(start, margins)

    def take_apart(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """A matrix and frames that :meth:`assemble` turns back into ``weight``, in float64.

        The outermost tap is found from the two border slices of the kernel along its axis: ``U`` spans the first and is
        perpendicular to the last. Taking it off leaves a shorter kernel, and so on. For a kernel that was assembled
        from generic frames this is exact up to rounding; for any other it gives one orthogonal kernel near it.
        """
        kernel, found = self.unfold(weight.double()), []
        for axis in reversed(self.axes):
            dim, length = axis + 2, kernel.shape[axis + 2]
            if self.frames_shape is None:
                from_core = length - self.core[axis]
                kernel = kernel.narrow(dim, 1 if from_core % 2 == 0 else 0, length - 1)
                continue
            first, last = kernel.narrow(dim, 0, 1).flatten(2), kernel.narrow(dim, length - 1, 1).flatten(2)
            frame = torch.linalg.eigh(first @ first.mT - last @ last.mT).eigenvectors[..., -(self.middle // 2) :]
            found.append(frame)
            near, far = kernel.narrow(dim, 0, length - 1), kernel.narrow(dim, 1, length - 1)
            kernel = far + (frame @ (frame.mT @ (near - far).flatten(2))).view_as(far)
        return self.flatten(kernel), torch.stack(found[::-1]) if found else None

    def start(self, matrix: Tensor) -> Tensor:
        """The core kernel of a matrix, ``(groups, middle, *core, carried)``: what the taps multiply."""
        grouped = matrix if self.groups > 1 else matrix.unsqueeze(0)
        if self.after_core:
            return grouped.reshape(self.groups, self.out_channels, *self.core, self.in_channels)
        return grouped.unflatten(-1, (self.middle, *self.core)).movedim(1, -1)

    def flatten(self, core: Tensor) -> Tensor:
        """The matrix of a core kernel: :meth:`start` undone."""
        return (core if self.after_core else core.movedim(-1, 1)).reshape(self.matrix_shape)

    def unfold(self, weight: Tensor) -> Tensor:
        """A kernel as taps see it, ``(groups, middle, *k, carried)``, with zeros for channels that are not fed."""
        kernel = weight.reshape(self.groups, self.out_channels, self.in_channels, *self.kernel_size)
        kernel = kernel.movedim(2, -1) if self.after_core else kernel.movedim(1, -1)
        missing = self.middle - kernel.shape[1]
        if missing:
            kernel = torch.cat((kernel, kernel.new_zeros(self.groups, missing, *kernel.shape[2:])), 1)
        return kernel


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
            if frames is not None:
                frames = _orthonormal_frames(frames)
            return self.plan.assemble(orthogonal, frames).to(dtype)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, :meth:`right_inverse` draws matrix and frames uniformly instead of taking the weight's."""
        self._draws = True
        try:
            yield
        finally:
            self._draws = False

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Free tensors for ``weight``; see :meth:`KernelPlan.take_apart` for one that is not orthogonal.

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
        return self.plan.take_apart(weight)

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
    work = torch.float64 if dtype == torch.float64 else torch.float32

    def haar(shape: Sequence[int]) -> Tensor:
        return qr_orthogonalize(torch.randn(*shape, generator=generator, device=device, dtype=work))

    matrix = haar(plan.matrix_shape)
    return matrix, None if plan.frames_shape is None else haar(plan.frames_shape)


def _orthonormal_frames(frames: Tensor) -> Tensor:
    try:
        return cholesky_orthogonalize(frames)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} (the free frames behind the kernel)") from None
