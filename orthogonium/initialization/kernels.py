"""Orthogonal kernels to start plain convolutions from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthogonium._checks import as_tuple, check_floating, check_kernel_exists
from orthogonium.linalg._precision import without_autocast
from orthogonium.parametrizations.kernel import KernelPlan, draw_parts


def conv_orthogonal_(
    tensor: Tensor,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a convolution's weight, in place, with an orthogonal kernel times ``gain``.

    Under circular padding that tiles the image, all singular values of the operator are then ``gain``; reshaped-matrix
    orthogonality (``nn.init.orthogonal_``) leaves them spread out instead.

    Args:
        tensor: ``(out, in / groups, *k)`` in 1 to 3 dimensions; of a transposed convolution as it stands.
        stride, groups: of the convolution.
        gain: the common singular value.
        generator: for reproducible draws, on the tensor's device.

    Returns:
        ``tensor``.

    Raises:
        ValueError: no kernel, groups that do not divide, or no orthogonal kernel of that shape and stride exists.
        TypeError: not real floating point.

    Source: Li et al., "Preventing gradient attenuation in Lipschitz constrained convolutional networks", NeurIPS 2019.
    """
    dims = _check_kernel(tensor, groups)
    steps = as_tuple("stride", stride, dims, least=1)
    size = tuple(tensor.shape[2:])
    check_kernel_exists(tensor.shape[0] // groups, tensor.shape[1], size, steps, (1,) * dims, groups)
    plan = KernelPlan(tensor.shape[0] // groups, tensor.shape[1], size, steps, groups)
    return _fill(tensor, plan, gain, generator)


def delta_orthogonal_(
    tensor: Tensor, groups: int = 1, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a convolution's weight, in place: an orthogonal matrix times ``gain`` at the centre tap, zeros elsewhere.

    The layer starts as a 1×1 convolution: at stride one, all its singular values are ``gain``.

    Args:
        tensor: ``(out, in / groups, *k)``; the centre of an even side is the tap ``(k − 1) // 2``.
        groups: of the convolution.
        gain: the common singular value.
        generator: for reproducible draws, on the tensor's device.

    Returns:
        ``tensor``.

    Raises:
        ValueError: no kernel, or groups that do not divide.
        TypeError: not real floating point.

    Source: Xiao et al., "Dynamical isometry and a mean field theory of CNNs", ICML 2018.
    """
    dims = _check_kernel(tensor, groups)
    plan = KernelPlan(tensor.shape[0] // groups, tensor.shape[1], (1,) * dims, (1,) * dims, groups)
    centre: tuple[slice, ...] = tuple(slice((k - 1) // 2, (k - 1) // 2 + 1) for k in tensor.shape[2:])
    with torch.no_grad():
        tensor.zero_()
        _fill(tensor[(slice(None), slice(None), *centre)], plan, gain, generator)
    return tensor


def _check_kernel(tensor: Tensor, groups: int) -> int:
    check_floating("tensor", tensor)
    if tensor.ndim not in (3, 4, 5) or tensor.numel() == 0:
        raise ValueError(f"tensor must be (out, in / groups, *k) in 1 to 3 dimensions, got {tuple(tensor.shape)}")
    if groups < 1 or tensor.shape[0] % groups:
        raise ValueError(f"groups={groups} must divide the {tensor.shape[0]} channels on the first axis")
    return tensor.ndim - 2


def _fill(tensor: Tensor, plan: KernelPlan, gain: float, generator: torch.Generator | None) -> Tensor:
    with torch.no_grad(), without_autocast(tensor):
        if not tensor.is_meta:
            tensor.copy_(gain * plan.assemble(*draw_parts(plan, tensor.device, tensor.dtype, generator)))
    return tensor
