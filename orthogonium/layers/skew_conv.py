"""Orthogonal convolutions as exponentials of skew kernels: for depthwise layers too, where kernels only shift."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._checks import as_tuple, check_channels
from orthogonium.layers._circular import circular_pad
from orthogonium.layers._geometry import ConvGeometry
from orthogonium.layers.constrain import constrain
from orthogonium.linalg.kernels import convolve
from orthogonium.parametrizations.normalizers import BatchedIdentity
from orthogonium.parametrizations.skew_kernel import SkewKernel


class _SkewOrthoConv(nn.Module):
    _dims: ClassVar[int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        angle: float = 2.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_channels(in_channels, out_channels, groups)
        size = as_tuple("kernel_size", kernel_size, self._dims, least=1)
        if any(k % 2 == 0 for k in size):
            raise ValueError(f"kernel_size must be odd along each axis, so that a skew kernel has a centre, got {size}")
        spread = as_tuple("dilation", dilation, self._dims, least=1)
        geometry = ConvGeometry.make(size, (1,) * self._dims, spread, "same", padding_mode)
        super().__init__()
        self.geometry = geometry
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.dilation, self.padding_mode, self.angle = (
            size,
            spread,
            padding_mode,
            float(angle),
        )
        self.channels = max(in_channels, out_channels)
        shape = (self.channels, self.channels // groups, *size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        constrain(self, "weight", BatchedIdentity(shape), SkewKernel(angle, groups))

    def reset_parameters(self) -> None:
        """Gaussian entries that turn by about a radian, and no bias."""
        with torch.no_grad():
            fan = self.channels // self.groups * math.prod(self.kernel_size)
            if not self.weight.is_meta:
                drawn = torch.randn_like(self.weight) * fan**-0.5
                if is_parametrized(self, "weight"):
                    self.weight = drawn
                else:
                    self.weight.copy_(drawn)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in, *sides)`` to ``(batch, out, *sides)``."""
        self.geometry.check_sides(tuple(input.shape[-self._dims :]))
        return self._turned(input, self.weight, self.bias)

    def _turned(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axis = input.ndim - self._dims - 1
        if self.in_channels < self.out_channels:  # each group's channels, followed by its share of zeros
            grouped = input.unflatten(axis, (self.groups, -1))
            missing = (self.out_channels - self.in_channels) // self.groups
            input = F.pad(grouped, (0, 0) * self._dims + (0, missing)).flatten(axis, axis + 1)
        term, total = input, input
        for order in range(1, self._terms(weight.dtype) + 1):
            term = self._skew(term, weight) / order
            total = total + term
        if self.out_channels < self.in_channels:
            grouped = total.unflatten(axis, (self.groups, -1))
            total = grouped.narrow(axis + 1, 0, self.out_channels // self.groups).flatten(axis, axis + 1)
        return total if bias is None else total + bias.view(-1, *(1,) * self._dims)

    def _terms(self, dtype: torch.dtype) -> int:
        """The series' order from which on the rest is below a quarter of the rounding."""
        order, rest = 0, 1.0
        while rest > torch.finfo(dtype).eps / 4 or order < self.angle:
            order += 1
            rest *= self.angle / order
        return order

    def _skew(self, features: Tensor, weight: Tensor) -> Tensor:
        pads = self.geometry.pads
        padding = tuple(before for before, _ in pads)
        if self.geometry.circular and any(map(sum, pads)):
            features, padding = circular_pad(features, pads), (0,) * len(pads)
        return convolve(features, weight, padding=padding, dilation=self.dilation, groups=self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, padding_mode={self.padding_mode}, angle={self.angle}"
        )


_DOC = """A {dims}-dimensional orthogonal convolution of stride one: ``exp(A) x``, ``A`` a skew kernel.

    Orthogonal under circular and under zero padding alike, since cutting a skew operator leaves it skew. The
    exponential is summed term by term on the features (about 15 convolutions in float32), so it reaches further than
    its kernel, and it turns depthwise layers, for which explicit orthogonal kernels are shifts. With more outputs than
    inputs, zero channels are added first; with fewer, channels are dropped afterwards.

    Args:
        in_channels, out_channels, dilation, groups, bias, device, dtype: as in :class:`torch.nn.Conv{n}d`.
        kernel_size: odd.
        padding_mode: ``"circular"`` or ``"zeros"``; the padding keeps the image size.
        angle: bound on the norm of ``A``: larger ones turn further and need more terms.

    Raises:
        ValueError: an even kernel, groups that do not divide, or an image smaller than half the kernel.

    Source: Singla and Feizi, "Skew orthogonal convolutions", ICML 2021.
    """


class SkewOrthoConv1d(_SkewOrthoConv):
    __doc__ = _DOC.format(dims="one", n=1)
    _dims = 1


class SkewOrthoConv2d(_SkewOrthoConv):
    __doc__ = _DOC.format(dims="two", n=2)
    _dims = 2


class SkewOrthoConv3d(_SkewOrthoConv):
    __doc__ = _DOC.format(dims="three", n=3)
    _dims = 3
