"""What the weight of a torch module is: a matrix, matrices stacked on each other, or the kernel of a convolution."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from orthogonium._checks import check_kernel_exists
from orthogonium.parametrizations.kernel_plan import KernelPlan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
WITH_LINEAR_MAPS = (nn.Linear, _ConvNd, *RECURRENT, nn.MultiheadAttention)
_ATTENTION = {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}


def stacked_blocks(module: nn.Module, name: str, rows: int) -> int:
    """Of how many matrices the ``rows`` of ``module.name`` are a stack: one per gate, or one per head of attention."""
    if isinstance(module, RECURRENT) and name.startswith(("weight_ih", "weight_hh")):
        return rows // module.hidden_size
    if isinstance(module, nn.MultiheadAttention) and name in _ATTENTION:
        return _ATTENTION[name] * module.num_heads
    return 1


def weight_names(module: nn.Module) -> list[str]:
    """The weights of a module of :data:`WITH_LINEAR_MAPS`, by the names under which its forward pass reads them.

    Where a hook of the old kind (weight norm, spectral norm, pruning) computes one, no parameter has that name.
    """
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.MultiheadAttention):
        separate = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return ["in_proj_weight"] if module._qkv_same_embed_dim else separate
    return ["weight"]


def kernel_plan(module: _ConvNd) -> KernelPlan:
    """How the kernel is composed; of a transposed convolution that of its adjoint, which is the same kernel."""
    outer = module.in_channels if module.transposed else module.out_channels
    inner = module.out_channels if module.transposed else module.in_channels
    groups = module.groups
    return KernelPlan(outer // groups, inner // groups, tuple(module.kernel_size), tuple(module.stride), groups)


def check_kernel(module: _ConvNd) -> None:
    """Raise ``ValueError`` unless an orthogonal kernel exists for the channels, sizes and strides of ``module``."""
    plan = kernel_plan(module)
    shape = (plan.out_channels, plan.in_channels, plan.kernel_size, plan.stride)
    check_kernel_exists(*shape, tuple(module.dilation), plan.groups)
