"""What orthogonality means for the weight of a torch module: of which matrices, or of which kernel."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from orthogonium._checks import check_kernel_exists
from orthogonium.layers._geometry import ConvGeometry
from orthogonium.parametrizations import BlockPlan, KernelPlan


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


def kernel_plan(module: _ConvNd) -> KernelPlan:
    """How the kernel is composed; of a transposed convolution that of its adjoint, which is the same kernel."""
    outer = module.in_channels if module.transposed else module.out_channels
    inner = module.out_channels if module.transposed else module.in_channels
    groups = module.groups
    return KernelPlan(outer // groups, inner // groups, tuple(module.kernel_size), tuple(module.stride), groups)


def check_kernel(module: _ConvNd) -> None:
    """Raise ``ValueError`` unless an orthogonal kernel exists for the channels, sizes and strides of ``module``."""
    plan = kernel_plan(module)
    dilation = tuple(d if k > 1 else 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    shape = (plan.out_channels, plan.in_channels, plan.kernel_size, plan.stride)
    check_kernel_exists(*shape, dilation, plan.groups)


def default_blocks(module: nn.Module, name: str) -> int:
    """Into how many stacked blocks a matrix falls by the meaning of its module: gates, or heads of attention."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and name.startswith(("weight_ih", "weight_hh")):
        weight = module._parameters[name]
        return 1 if weight is None else weight.shape[0] // module.hidden_size
    if isinstance(module, nn.MultiheadAttention):
        heads = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
        return heads[name] * module.num_heads if name in heads else 1
    return 1


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
