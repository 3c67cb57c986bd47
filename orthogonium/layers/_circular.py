"""Circular padding and its adjoint, each the other's derivative.

``torch.nn.functional.pad`` computes the same values, but its derivative fills a zero tensor for every copy that the
padding consists of. Here a border is added where it came from, and nothing else is touched.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from orthogonium.linalg._precision import differentiates_forward, is_vectorized

Pads = Sequence[tuple[int, int]]


def circular_pad(features: Tensor, pads: Pads) -> Tensor:
    """``features`` on a longer stretch of the circle: ``pad(…, mode="circular")``, to the bit.

    Args:
        features: ``(..., *sides)``.
        pads: ``(before, after)`` for each of the last axes, none longer than its side.

    Returns:
        ``(..., *(before + side + after))``; ``channels_last`` is kept.
    """
    if not _is_plain(features) or any(p < 0 or p > n for n, pair in _axes(features, pads) for p in pair):
        return _torch_pad(features, pads)
    if not (features.requires_grad and torch.is_grad_enabled()):
        return _padded(features, pads)
    padded: Tensor = _Pad.apply(features, tuple(pads))
    return padded


def _torch_pad(features: Tensor, pads: Pads) -> Tensor:
    return F.pad(features, [p for pair in reversed(pads) for p in pair], mode="circular")


def circular_fold(wide: Tensor, pads: Pads) -> Tensor:
    """The adjoint of :func:`circular_pad`: the borders are cut off, and added where padding would take them from.

    Args:
        wide: ``(..., *(before + side + after))``, no border longer than ``side``.
        pads: ``(before, after)`` for each of the last axes.

    Returns:
        ``(..., *sides)``.
    """
    if not _is_plain(wide):
        for axis, (before, after) in enumerate(pads):
            wide = _fold_axis(wide, axis - len(pads), before, after)
        return wide
    folded: Tensor = _Fold.apply(wide, tuple(pads))
    return folded


def _is_plain(tensor: Tensor) -> bool:
    """Whether nobody traces, transforms or wraps; those are better served by torch's own operations."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not differentiates_forward()
        and not is_vectorized(tensor)
    )


def _axes(tensor: Tensor, pads: Pads) -> Iterator[tuple[int, tuple[int, int]]]:
    return zip(tensor.shape[-len(pads) :], pads, strict=True)


def _fold_axis(wide: Tensor, dim: int, before: int, after: int) -> Tensor:
    """The adjoint along one axis, in differentiable parts."""
    side = wide.shape[dim] - before - after
    core = wide.narrow(dim, before, side)
    behind = [0, 0] * (-dim - 1)
    if before:
        core = core + F.pad(wide.narrow(dim, 0, before), (*behind, side - before, 0))
    if after:
        core = core + F.pad(wide.narrow(dim, before + side, after), (*behind, 0, side - after))
    return core


class _Pad(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, pads: Pads) -> Tensor:
        ctx.pads = pads
        return _padded(features, pads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return circular_fold(grad, ctx.pads), None


def _padded(features: Tensor, pads: Pads) -> Tensor:
    """A new tensor, by torch's own padding in row-major order: it would lay ``channels_last`` out anew."""
    dims, memory_format = features.ndim, _memory_format(features)
    if memory_format is torch.contiguous_format and dims - len(pads) in (1, 2):
        return _torch_pad(features, pads)
    shape = [*features.shape[: -len(pads)], *(side + sum(pair) for side, pair in _axes(features, pads))]
    wide = torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=memory_format)
    centre = wide
    for axis, (before, _) in enumerate(pads, dims - len(pads)):
        centre = centre.narrow(axis, before, features.shape[axis])
    centre.copy_(features)
    # the last axis first, along rows of the centre; then the one before, along rows already complete
    for axis in range(dims - 1, dims - len(pads) - 1, -1):
        (before, after), side = pads[axis - dims], features.shape[axis]
        rows = wide
        for other in range(dims - len(pads), axis):
            rows = rows.narrow(other, pads[other - dims][0], features.shape[other])
        if before:
            rows.narrow(axis, 0, before).copy_(rows.narrow(axis, side, before))
        if after:
            rows.narrow(axis, before + side, after).copy_(rows.narrow(axis, before, after))
    return wide


class _Fold(Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, pads: Pads) -> Tensor:
        ctx.pads = pads
        return _folded(wide, pads, len(pads))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return circular_pad(grad, ctx.pads), None


def _folded(wide: Tensor, pads: Pads, count: int) -> Tensor:
    """A new tensor, folded along the first ``count`` of the padded axes; sums are taken as in :func:`_fold_axis`."""
    if count == 0:
        return wide.clone()
    before, after = pads[count - 1]
    axis = wide.ndim - len(pads) + count - 1
    side = wide.shape[axis] - before - after
    centre = _folded(wide.narrow(axis, before, side), pads, count - 1)
    if before:
        centre.narrow(axis, side - before, before).add_(_folded(wide.narrow(axis, 0, before), pads, count - 1))
    if after:
        centre.narrow(axis, 0, after).add_(_folded(wide.narrow(axis, before + side, after), pads, count - 1))
    return centre


def _memory_format(features: Tensor) -> torch.memory_format:
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if features.ndim == dims and features.is_contiguous(memory_format=memory_format):
            return torch.contiguous_format if features.is_contiguous() else memory_format
    return torch.contiguous_format
