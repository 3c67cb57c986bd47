"""Convolutions that never expand, at the price of one small convolution of the kernel: almost-orthogonal layers."""

from collections.abc import Sequence

import torch
from torch import nn

from orthogonium.layers.constrain import constrain
from orthogonium.layers.conv import _PaddedConv
from orthogonium.layers.conv_transposed import _PaddedConvTranspose
from orthogonium.parametrizations.almost_orthogonal import AlmostOrthogonalKernel
from orthogonium.parametrizations.normalizers import BatchedIdentity


class _AlmostOrthogonalConv(_PaddedConv):
    _exact = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = (kernel_size, stride, padding, dilation)
        self._set_up(in_channels, out_channels, *spatial, groups, bias, padding_mode, device, dtype)
        constrain(self, "weight", BatchedIdentity(self.weight.shape), AlmostOrthogonalKernel(groups))


class _AlmostOrthogonalConvTranspose(_PaddedConvTranspose):
    _exact = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = "same",
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "circular",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        self._set_up(in_channels, out_channels, *spatial, device, dtype)
        constrain(self, "weight", BatchedIdentity(self.weight.shape), AlmostOrthogonalKernel(groups))


_DOC = """A {what} whose kernel is rescaled channel by channel so that it never grows a distance.

    Cheaper than an orthogonal kernel and without its conditions on channels, but it may shrink distances; training
    drives it towards orthogonality where that helps. With a stride the bound of stride one is used, which is loose.

    Args:
        all but ``padding="same"``, ``padding_mode="circular"``: as in :class:`torch.nn.{torch_name}`.

    Raises:
        ValueError: groups that do not divide, or padding under which windows overlap; in the call, image sides
        likewise.

    Source: Prach and Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks", ECCV 2022.
    """


class AOLConv1d(_AlmostOrthogonalConv, nn.Conv1d):
    __doc__ = _DOC.format(what="one-dimensional convolution", torch_name="Conv1d")
    _dims = 1


class AOLConv2d(_AlmostOrthogonalConv, nn.Conv2d):
    __doc__ = _DOC.format(what="two-dimensional convolution", torch_name="Conv2d")
    _dims = 2


class AOLConv3d(_AlmostOrthogonalConv, nn.Conv3d):
    __doc__ = _DOC.format(what="three-dimensional convolution", torch_name="Conv3d")
    _dims = 3


class AOLConvTranspose1d(_AlmostOrthogonalConvTranspose, nn.ConvTranspose1d):
    __doc__ = _DOC.format(what="one-dimensional transposed convolution", torch_name="ConvTranspose1d")
    _dims = 1


class AOLConvTranspose2d(_AlmostOrthogonalConvTranspose, nn.ConvTranspose2d):
    __doc__ = _DOC.format(what="two-dimensional transposed convolution", torch_name="ConvTranspose2d")
    _dims = 2


class AOLConvTranspose3d(_AlmostOrthogonalConvTranspose, nn.ConvTranspose3d):
    __doc__ = _DOC.format(what="three-dimensional transposed convolution", torch_name="ConvTranspose3d")
    _dims = 3
