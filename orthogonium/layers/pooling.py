"""Pooling that never grows a distance: windows that do not overlap, each reduced by a map of norm one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium._checks import as_tuple

_AVERAGES: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class _WindowPool(nn.Module):
    _dims: ClassVar[int]

    def __init__(self, kernel_size: int | Sequence[int]) -> None:
        super().__init__()
        self.kernel_size = as_tuple("kernel_size", kernel_size, self._dims, least=1)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class _ScaledAvgPool(_WindowPool):
    def forward(self, features: Tensor) -> Tensor:
        """``(batch, channels, *sides)`` to ``(batch, channels, *(sides // kernel_size))``."""
        scale = torch.Size(self.kernel_size).numel() ** 0.5
        pooled: Tensor = _AVERAGES[self._dims](features, self.kernel_size)
        return pooled * scale


class _L2NormPool(_WindowPool):
    def forward(self, features: Tensor) -> Tensor:
        """``(batch, channels, *sides)`` to ``(batch, channels, *(sides // kernel_size))``."""
        windows = features
        for axis, size in enumerate(self.kernel_size):
            dim = axis - self._dims
            count = windows.shape[dim] // size
            split = windows.narrow(dim, 0, count * size).unflatten(dim, (-1, size))  # …, count, size, …
            windows = split.movedim(dim, 1)
        return torch.linalg.vector_norm(windows, dim=tuple(range(1, self._dims + 1)))


_AVERAGE = """Average over windows that do not overlap, times the root of their size: an operator of norm one.

    Plain averaging over ``n`` entries has norm ``1 / √n`` and so wastes as much of the Lipschitz constant. All singular
    values are one here. What does not fill a window at the far border is left out, as in torch.

    Args:
        kernel_size: of the windows, which move by as much.

    Shape:
        ``(batch, channels, {sides})`` to ``(batch, channels, {pooled})``.
    """

_NORM = """The Euclidean norm of each window, windows not overlapping: 1-Lipschitz, and it keeps the norm of the input.

    The gradient has norm one in each window that is not zero, and is zero in those that are. What does not fill a
    window at the far border is left out.

    Args:
        kernel_size: of the windows, which move by as much.

    Shape:
        ``(batch, channels, {sides})`` to ``(batch, channels, {pooled})``.
    """

_SIDES = [
    {"sides": "side", "pooled": "side // kernel_size"},
    {"sides": "height, width", "pooled": "…, … // kernel_size"},
    {"sides": "depth, height, width", "pooled": "…, …, … // kernel_size"},
]


class ScaledAvgPool1d(_ScaledAvgPool):
    __doc__ = _AVERAGE.format(**_SIDES[0])
    _dims = 1


class ScaledAvgPool2d(_ScaledAvgPool):
    __doc__ = _AVERAGE.format(**_SIDES[1])
    _dims = 2


class ScaledAvgPool3d(_ScaledAvgPool):
    __doc__ = _AVERAGE.format(**_SIDES[2])
    _dims = 3


class L2NormPool1d(_L2NormPool):
    __doc__ = _NORM.format(**_SIDES[0])
    _dims = 1


class L2NormPool2d(_L2NormPool):
    __doc__ = _NORM.format(**_SIDES[1])
    _dims = 2


class L2NormPool3d(_L2NormPool):
    __doc__ = _NORM.format(**_SIDES[2])
    _dims = 3
