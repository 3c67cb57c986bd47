"""Orthogonal transposed convolutions: adjoints of orthogonal convolutions, circular padding included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium._checks import as_tuple
from orthogonium.layers._circular import circular_fold
from orthogonium.layers.conv import _DOC, _OrthoKernelLayer
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _PaddedConvTranspose(_OrthoKernelLayer):
    """The adjoint of a convolution from ``out_channels`` to ``in_channels`` with the same kernel and padding."""

    def _set_up(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        output_padding: int | Sequence[int],
        groups: int,
        bias: bool,
        dilation: int | Sequence[int],
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        geometry = self._checked(
            out_channels, in_channels, kernel_size, stride, padding, dilation, groups, padding_mode, dtype
        )
        more = as_tuple("output_padding", output_padding, self._dims, least=0)
        sizes: tuple[Any, ...] = (geometry.kernel_size, geometry.stride, 0, more)
        rest: tuple[Any, ...] = (groups, bias, geometry.dilation, "zeros", device, dtype)
        super().__init__(in_channels, out_channels, *sizes, *rest)
        self.geometry, self.padding_mode = geometry, padding_mode
        self.padding = padding if isinstance(padding, str) else tuple(before for before, _ in geometry.pads)
        gaps = [s - geometry.extent(axis) for axis, s in enumerate(geometry.stride)]
        self._filled = tuple(max(0, gap) if padding == "same" else 0 for gap in gaps)
        for axis, (extra, filled) in enumerate(zip(more, self._filled, strict=True)):
            self._check_extra(axis, extra, filled)

    def _check_extra(self, axis: int, extra: int, filled: int) -> None:
        limit = max(self.geometry.stride[axis], self.geometry.dilation[axis]) - filled
        if not 0 <= extra < limit:
            raise ValueError(
                f"output_padding={extra} (axis {axis}) must be at least 0 and below {limit} for stride="
                f"{self.geometry.stride[axis]}, dilation={self.geometry.dilation[axis]} and padding={self.padding!r}"
            )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``(batch, in, *windows)`` to ``(batch, out, *sides)``.

        Args:
            input: the features.
            output_size: the sides wanted, in place of ``output_padding``.

        Raises:
            ValueError: sides that would break the bound, or cannot be reached.
        """
        windows = self._check_input(input, self.in_channels)
        extra = tuple(self.output_padding) if output_size is None else self._extra_for(windows, output_size)
        self._check_sides(windows, extra)
        return self._transposed_forward(input, self.weight, self.bias, extra)

    def _side(self, axis: int, windows: int, extra: int) -> int:
        full = (windows - 1) * self.geometry.stride[axis] + self.geometry.extent(axis) + self._filled[axis]
        return full + extra - sum(self.geometry.pads[axis])

    def _extra_for(self, windows: tuple[int, ...], output_size: Sequence[int]) -> tuple[int, ...]:
        sides = tuple(output_size)[-self._dims :]
        if len(output_size) not in (self._dims, self._dims + 1, self._dims + 2):
            raise ValueError(f"output_size must have {self._dims} sides, got {tuple(output_size)}")
        extra = tuple(side - self._side(axis, windows[axis], 0) for axis, side in enumerate(sides))
        for axis, entry in enumerate(extra):
            limit = max(self.geometry.stride[axis], self.geometry.dilation[axis]) - self._filled[axis]
            if not 0 <= entry < limit:
                least = self._side(axis, windows[axis], 0)
                raise ValueError(
                    f"output_size={sides} (axis {axis}) cannot be reached from {windows[axis]} windows: sides of "
                    f"{least} to {least + limit - 1} can"
                )
        return extra

    def _check_sides(self, windows: tuple[int, ...], extra: tuple[int, ...]) -> None:
        for axis, count in enumerate(windows):
            side = self._side(axis, count, extra[axis])
            if not self.geometry.fits(axis, side, count):
                wanted = count * self.geometry.stride[axis] - side + extra[axis]
                reachable = max(self.geometry.stride[axis], self.geometry.dilation[axis]) - self._filled[axis]
                advice = f"output_padding={wanted}, " if extra[axis] < wanted < reachable else ""
                raise ValueError(
                    f"{count} windows (axis {axis}) with kernel_size={self.kernel_size[axis]}, stride="
                    f"{self.geometry.stride[axis]}, padding {self.geometry.pads[axis]} and "
                    f"output_padding={extra[axis]} "
                    f"give an image side of {side}, around which they overlap: the norm would exceed one. "
                    f"Use {advice}padding='same' or padding_mode='zeros'."
                )

    def _transposed_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None, extra: tuple[int, ...]) -> Tensor:
        added = tuple(more + filled for more, filled in zip(extra, self._filled, strict=True))
        pads = self.geometry.pads
        transposed = _TRANSPOSED[self._dims]
        if all(before == after and (before == 0 or not self.geometry.circular) for before, after in pads):
            padding = tuple(before for before, _ in pads)
            return transposed(input, weight, bias, self.stride, padding, added, self.groups, self.dilation)
        wide = transposed(input, weight, None, self.stride, 0, added, self.groups, self.dilation)
        if self.geometry.circular:
            wide = circular_fold(wide, pads)
        else:
            for axis, (before, after) in enumerate(pads, -self._dims):
                wide = wide.narrow(axis, before, wide.shape[axis] - before - after)
        return wide if bias is None else wide + bias.view(-1, *(1,) * self._dims)


class _OrthoConvTranspose(_PaddedConvTranspose):
    """With an orthogonal kernel."""

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
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spatial = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        self._set_up(in_channels, out_channels, *spatial, device, dtype)
        self._make_orthogonal(ortho_params)


_MORE = """        output_padding: more sides of the output, below the stride, as in torch. With ``padding="same"`` the
output has
            ``windows · stride`` sides without it.
"""
_EXISTS = "A kernel shorter than the stride needs ``in_channels ≤ out_channels · Π min(kernel_size, stride)``."


def _documentation(dims: int, word: str) -> str:
    text = _DOC.format(
        first=f"A {word} transposed convolution, the adjoint of an orthogonal convolution and so orthogonal.",
        torch_name=f"ConvTranspose{dims}d",
        exists=_EXISTS,
        more=_MORE,
        sides="windows · stride",
    )
    return text.replace("``out_channels ≥ in_channels · Π stride``", "``out_channels · Π stride ≥ in_channels``")


class OrthoConvTranspose1d(_OrthoConvTranspose, nn.ConvTranspose1d):
    __doc__ = _documentation(1, "one-dimensional")
    _dims = 1


class OrthoConvTranspose2d(_OrthoConvTranspose, nn.ConvTranspose2d):
    __doc__ = _documentation(2, "two-dimensional")
    _dims = 2


class OrthoConvTranspose3d(_OrthoConvTranspose, nn.ConvTranspose3d):
    __doc__ = _documentation(3, "three-dimensional")
    _dims = 3


AdaptiveOrthoConvTranspose2d = OrthoConvTranspose2d
