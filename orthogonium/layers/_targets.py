"""The geometry of a torch convolution, and the stack that a matrix is said to be."""

from typing import Any

from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from orthogonium.layers._geometry import ConvGeometry
from orthogonium.parametrizations import BlockPlan


def geometry_of(module: _ConvNd) -> ConvGeometry:
    """Padding, stride and dilation of a convolution of torch or of this library.

    Raises:
        ValueError: reflect or replicate padding, or circular padding under which windows overlap on every image.
    """
    own = getattr(module, "geometry", None)
    if isinstance(own, ConvGeometry):
        return own
    dilation = tuple(d if k > 1 else 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    padding: Any = module.padding
    return ConvGeometry.make(tuple(module.kernel_size), tuple(module.stride), dilation, padding, module.padding_mode)


def block_plan(owner: str, name: str, weight: Tensor, blocks: int) -> BlockPlan:
    """Raises ``ValueError`` where ``blocks`` do not divide the rows."""
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise TypeError(f"blocks must be an integer, got {blocks!r}")
    rows, columns = weight.shape
    if blocks < 1 or rows % blocks:
        raise ValueError(f"blocks={blocks} must divide the {rows} rows of {owner}.{name}")
    return BlockPlan(blocks, rows // blocks, columns)


def checks_sides(module: _ConvNd, geometry: ConvGeometry) -> bool:
    """Whether the bound depends on image sides, so that each call has to check them."""
    padded = any(pad != (0, 0) for pad in geometry.pads)
    strided = any(s > 1 for s in geometry.stride)
    return geometry.circular and padded and strided and not isinstance(module, _ConvTransposeNd)
