"""How an orthogonal kernel is composed, and taken apart again."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

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

    @cached_property
    def core(self) -> tuple[int, ...]:
        return tuple(min(k, s) for k, s in zip(self.kernel_size, self.stride, strict=True))

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axis of each two-tap kernel."""
        pairs = zip(self.kernel_size, self.core, strict=True)
        return tuple(axis for axis, (k, core) in enumerate(pairs) for _ in range(k - core))

    @cached_property
    def after_core(self) -> bool:
        return prod(self.core) == 1 and self.out_channels >= self.in_channels

    @cached_property
    def middle(self) -> int:
        if self.after_core:
            return self.out_channels
        return max(self.in_channels, self.out_channels // prod(self.core)) if self.axes else self.in_channels

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(groups, rows, columns)``, without ``groups`` where there is one."""
        columns = self.in_channels if self.after_core else self.middle * prod(self.core)
        return (*((self.groups,) if self.groups > 1 else ()), self.out_channels, columns)

    @cached_property
    def frames_shape(self) -> tuple[int, ...] | None:
        """``(taps, groups, middle, middle // 2)``; ``None`` without taps, and for one channel, only shifted."""
        rank = self.middle // 2
        return (len(self.axes), self.groups, self.middle, rank) if self.axes and rank else None

    @property
    def only_shifts(self) -> bool:
        """Whether each group has one channel, so that the orthogonal kernels are signed shifts."""
        return bool(self.axes) and self.frames_shape is None

    @cached_property
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

    def positions(self, matrix: Tensor) -> Tensor:
        """The core kernel with its positions first: ``(groups, Π core, out, in or middle)``."""
        if self.after_core:
            return matrix.reshape(self.groups, 1, self.out_channels, self.in_channels).contiguous()
        split = matrix.reshape(self.groups, self.out_channels, self.middle, prod(self.core))
        return split.permute(0, 3, 1, 2).contiguous()

    def matrix_of_positions(self, core: Tensor) -> Tensor:
        """:meth:`positions` undone."""
        return (core if self.after_core else core.permute(0, 2, 3, 1)).reshape(self.matrix_shape)

    def weight_of_positions(self, kernel: Tensor) -> Tensor:
        """The weight of a kernel with its positions first, ``(groups, Π kernel, out, in or middle)``; contiguous."""
        if not self.after_core:
            kernel = kernel[..., : self.in_channels]
        return kernel.permute(0, 2, 3, 1).contiguous().view(self.weight_shape)

    def positions_of_weight(self, weight: Tensor) -> Tensor:
        """:meth:`weight_of_positions` undone, with zeros for channels that are not fed."""
        kernel = weight.contiguous().view(self.groups, self.out_channels, self.in_channels, -1)
        missing = 0 if self.after_core else self.middle - self.in_channels
        kernel = nn.functional.pad(kernel, (0, 0, 0, missing)) if missing else kernel
        return kernel.permute(0, 3, 1, 2)

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
