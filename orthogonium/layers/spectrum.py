"""Singular values of a convolution layer on images of a given size."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.layers._geometry import ConvGeometry
from orthogonium.layers.conv import _OrthoKernelLayer
from orthogonium.linalg.kernel_spectrum import circular_singular_values, largest_singular_values

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LARGEST = 4096  # entries of the smaller side up to which the operator is written out


def singular_values(layer: nn.Module, input_shape: Sequence[int], count: int | None = None) -> Tensor:
    """Singular values, descending, of the linear map that a convolution layer is on images of this size, in float64.

    All of them, exact to rounding: by frequency where circular windows tile the image, from the written-out operator
    elsewhere, group by group. Where that operator is too large (more than 4,096 inputs and outputs per group),
    ``count`` is needed, and the largest ones come from a Lanczos iteration: estimates from below.

    Args:
        layer: ``nn.Conv1d/2d/3d`` or one of this library's convolutions, transposed or not.
        input_shape: ``(channels, *sides)``, with or without a batch in front.
        count: keep the largest ones only.

    Raises:
        TypeError: no convolution, or one of torch's transposed ones.
        ValueError: an image that the layer refuses, or an operator too large without ``count``.

    Source: Sedghi, Gupta and Long, "The singular values of convolutional layers", ICLR 2019.
    """
    geometry = _geometry_of(layer)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    dims = len(geometry.stride)
    shape = tuple(input_shape)[-dims - 1 :]
    with torch.no_grad():
        weight = layer.weight.detach().double()
        if isinstance(layer, _OrthoKernelLayer):
            probe = layer(torch.zeros(1, *shape, dtype=layer.weight.dtype, device=weight.device))
            sides = tuple(probe.shape[2:]) if layer.transposed else shape[1:]
        else:
            sides = shape[1:]
    held = tuple(geometry.windows(axis, side) for axis, side in enumerate(sides))
    # output padding beyond the stride, as a dilation allows, leaves room for windows that are not there
    windows = shape[1:] if layer.transposed else held
    if windows == held and geometry.is_tiled(sides):
        found = circular_singular_values(weight, sides, geometry.stride, geometry.dilation, layer.groups)
        return found if count is None else found[:count]
    spectra = []
    for kernel in weight.chunk(layer.groups):
        operator = _Operator(kernel, geometry, sides, windows)
        inputs, outputs = kernel.shape[1] * prod(sides), kernel.shape[0] * prod(windows)
        if min(inputs, outputs) <= _LARGEST:
            spectra.append(torch.linalg.svdvals(operator.matrix()))
            continue
        if count is None:
            raise ValueError(
                f"an operator with {inputs} inputs and {outputs} outputs per group is too large to be written out. "
                f"Ask for the largest values with count=..., or use circular padding and sides that "
                f"{geometry.stride} divides."
            )
        start = torch.randn(
            1, kernel.shape[1], *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(kernel.device)
        spectra.append(largest_singular_values(operator, operator.adjoint, start, count, steps=max(60, 4 * count)))
    values = torch.cat(spectra).sort(descending=True).values
    return values if count is None else values[:count]


def _geometry_of(layer: nn.Module) -> ConvGeometry:
    if isinstance(layer, _OrthoKernelLayer):
        return layer.geometry
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"layer must be a convolution such as nn.Conv2d or OrthoConvTranspose2d, got {type(layer)}")
    if layer.padding_mode not in ("circular", "zeros"):
        raise ValueError(f"padding_mode={layer.padding_mode!r} is not known here: 'circular' and 'zeros' are")
    around = layer._reversed_padding_repeated_twice
    pads = tuple((around[2 * i], around[2 * i + 1]) for i in reversed(range(len(layer.kernel_size))))
    return ConvGeometry(layer.kernel_size, layer.stride, layer.dilation, pads, layer.padding_mode == "circular")


class _Operator:
    """One group's convolution, its adjoint and its matrix."""

    def __init__(
        self, kernel: Tensor, geometry: ConvGeometry, sides: tuple[int, ...], windows: tuple[int, ...]
    ) -> None:
        self.kernel, self.geometry, self.sides, self.windows = kernel, geometry, sides, windows

    def __call__(self, images: Tensor) -> Tensor:
        around = [p for pair in reversed(self.geometry.pads) for p in pair]
        mode = "circular" if self.geometry.circular else "constant"
        wide = F.pad(images, around, mode=mode) if any(around) else images
        convolution = _CONVOLUTIONS[len(self.sides)]
        found = convolution(wide, self.kernel, None, self.geometry.stride, 0, self.geometry.dilation)
        for axis, count in enumerate(self.windows, 2):
            found = found.narrow(axis, 0, count)
        return found

    def adjoint(self, features: Tensor) -> Tensor:
        with torch.enable_grad():
            images = features.new_zeros(1, self.kernel.shape[1], *self.sides).requires_grad_()
            (result,) = torch.autograd.grad(self(images), images, features)
        return result

    def matrix(self) -> Tensor:
        shape = (self.kernel.shape[1], *self.sides)
        impulses = torch.eye(prod(shape), dtype=self.kernel.dtype, device=self.kernel.device)
        return torch.cat([self(part.view(-1, *shape)).flatten(1) for part in impulses.split(512)]).T
