"""Orthogonal convolutions in one, two and three dimensions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._checks import as_tuple, check_channels, check_kernel_exists
from orthogonium.layers._circular import circular_pad
from orthogonium.layers._geometry import ConvGeometry
from orthogonium.layers.constrain import constrain_kernel
from orthogonium.parametrizations.kernel import OrthogonalKernel
from orthogonium.parametrizations.torch_weights import kernel_plan
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _OrthoKernelLayer(nn.modules.conv._ConvNd):
    """What convolutions and transposed convolutions share: the constraint and initialisation."""

    _dims: ClassVar[int]
    _exact: ClassVar[bool] = True  # whether the kernel is orthogonal, and so has to exist
    padding_mode: Any
    geometry: ConvGeometry
    _zeros_around: tuple[int, ...] | None
    ortho_params: OrthoParams

    def _checked(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
        dtype: torch.dtype | None,
    ) -> ConvGeometry:
        """Every check of the arguments; for a transposed convolution the channels of its adjoint."""
        check_channels(in_channels, out_channels, groups)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be real floating point, such as torch.float32, got {dtype}")
        size = as_tuple("kernel_size", kernel_size, self._dims, least=1)
        steps = as_tuple("stride", stride, self._dims, least=1)
        spread = as_tuple("dilation", dilation, self._dims, least=1)
        spread = tuple(d if k > 1 else 1 for k, d in zip(size, spread, strict=True))
        inner, outer = in_channels // groups, out_channels // groups
        if self._exact:
            check_kernel_exists(outer, inner, size, steps, spread, groups)
        return ConvGeometry.make(size, steps, spread, padding, padding_mode)

    def _make_orthogonal(self, ortho_params: OrthoParams) -> None:
        if not isinstance(ortho_params, OrthoParams):
            raise TypeError(f"ortho_params must be an OrthoParams such as CHOLESKY_ORTHO_PARAMS, got {ortho_params!r}")
        self.ortho_params = ortho_params
        constrain_kernel(self, "weight", kernel_plan(self), ortho_params, draw=True)

    def reset_parameters(self) -> None:
        """Draw a kernel uniformly from the orthogonal ones that the layer can have, and the bias as torch does."""
        with torch.no_grad():
            if is_parametrized(self, "weight"):
                kernel: Any = self.parametrizations.weight[0].orthogonalizer  # type: ignore
                if isinstance(kernel, OrthogonalKernel):
                    with kernel.drawing():
                        self.weight = self.weight
                elif not self.weight.is_meta:
                    self.weight = torch.randn_like(self.weight)
            elif not self._exact and not self.weight.is_meta:
                self.weight.normal_()
            if self.bias is not None and not self.bias.is_meta:
                inputs = self.out_channels if self.transposed else self.in_channels
                bound = (inputs // self.groups * torch.Size(self.kernel_size).numel()) ** -0.5
                nn.init.uniform_(self.bias, -bound, bound)

    def _check_input(self, features: Tensor, channels: int) -> tuple[int, ...]:
        """The image sides."""
        if features.ndim not in (self._dims + 1, self._dims + 2):
            raise ValueError(
                f"the input must be (batch, channels, {self._dims} sides) or without batch, got {tuple(features.shape)}"
            )
        if features.shape[-self._dims - 1] != channels:
            raise ValueError(f"the input must have {channels} channels, got shape {tuple(features.shape)}")
        return tuple(features.shape[-self._dims :])


class _PaddedConv(_OrthoKernelLayer):
    """A torch convolution whose padding and image sides are checked; the kernel is left to subclasses."""

    def _set_up(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        geometry = self._checked(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, dtype
        )
        sizes: tuple[Any, ...] = (geometry.kernel_size, geometry.stride, 0, geometry.dilation)
        rest: tuple[Any, ...] = (groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *sizes, *rest)
        self.geometry = geometry
        self.padding = padding if isinstance(padding, str) else tuple(before for before, _ in geometry.pads)
        self._reversed_padding_repeated_twice = [p for pair in reversed(geometry.pads) for p in pair]
        even = all(before == after and (before == 0 or not geometry.circular) for before, after in geometry.pads)
        # what torch's convolutions can pad by themselves
        self._zeros_around = tuple(before for before, _ in geometry.pads) if even else None

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in, *sides)`` to ``(batch, out, *windows)``; ``ValueError`` for sides that break the bound."""
        self.geometry.check_sides(self._check_input(input, self.in_channels))
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pads, padding = self.geometry.pads, self._zeros_around
        if padding is None:
            if self.geometry.circular:
                input = circular_pad(input, pads)
            else:
                input = F.pad(input, self._reversed_padding_repeated_twice)
            padding = (0,) * self._dims
        return _CONVOLUTIONS[self._dims](input, weight, bias, self.stride, padding, self.dilation, self.groups)


class _OrthoConv(_PaddedConv):
    """A torch convolution with an orthogonal kernel, and padding under which the whole operator is orthogonal."""

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
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = (kernel_size, stride, padding, dilation)
        self._set_up(in_channels, out_channels, *spatial, groups, bias, padding_mode, device, dtype)
        self._make_orthogonal(ortho_params)


_DOC = """{first}

    The layer never grows a distance, on any image that it accepts. With the default circular padding, a kernel at
    least as large as the stride and sides that the stride divides, all singular values of the operator are one: it
    keeps distances if ``out_channels ≥ in_channels · Π stride``, and gradients' norms otherwise. Zero padding loses
    what leaves the image, nothing else. Reflect and replicate padding are refused, and so are, in the call, image
    sides on which windows would overlap across a circular border.

    With one input and one output channel per group, orthogonal kernels at stride one are signed shifts: they have
    nothing to learn. Use the skew-exponential convolution or larger groups there.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype: as in
            :class:`torch.nn.{torch_name}`. {exists}
        padding: ``"same"`` (also with a stride: the extent of the kernel minus the stride in total), ``"valid"``, or
        integers. padding_mode: ``"circular"`` or ``"zeros"``.
        ortho_params: how the free matrix behind the kernel becomes orthogonal. The projectors of larger kernels are
            orthogonalised by Cholesky whatever is chosen here, since every exact method gives the same kernel.
{more}
    Shape:
        ``(batch, in_channels, *sides)`` to ``(batch, out_channels, *{sides})``, or both without batch.

    Raises:
        ValueError: no such orthogonal kernel exists, groups that do not divide, or padding under which windows overlap.
        TypeError: a size that is no integer, a dtype that is not real floating point.

    Source:
        Li et al., "Preventing gradient attenuation in Lipschitz constrained convolutional networks", NeurIPS 2019;
        Boissin et al., "An adaptive orthogonal convolution scheme", arXiv:2501.07930, 2025.
    """

_EXISTS = "A kernel shorter than the stride needs ``out_channels ≤ in_channels · Π min(kernel_size, stride)``."


class OrthoConv1d(_OrthoConv, nn.Conv1d):
    __doc__ = _DOC.format(
        first="A one-dimensional convolution whose operator is orthogonal.",
        torch_name="Conv1d",
        exists=_EXISTS,
        more="",
        sides="windows",
    )
    _dims = 1


class OrthoConv2d(_OrthoConv, nn.Conv2d):
    __doc__ = _DOC.format(
        first="A two-dimensional convolution whose operator is orthogonal.",
        torch_name="Conv2d",
        exists=_EXISTS,
        more="",
        sides="windows",
    )
    _dims = 2


class OrthoConv3d(_OrthoConv, nn.Conv3d):
    __doc__ = _DOC.format(
        first="A three-dimensional convolution whose operator is orthogonal.",
        torch_name="Conv3d",
        exists=_EXISTS,
        more="",
        sides="windows",
    )
    _dims = 3


AdaptiveOrthoConv2d = OrthoConv2d
