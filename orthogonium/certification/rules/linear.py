"""Rules for linear layers and convolutions."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.operators import (
    absolute_matrix_norm,
    kernel_norms,
    matrix_norm,
    module_norms,
    vector_norm,
)
from orthogonium.certification.rules.registry import (
    Refused,
    Response,
    Rounding,
    Variable,
    as_double,
    lipschitz_rule,
    sizes,
)
from orthogonium.layers import almost_orthogonal, conv, conv_transposed
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear
from orthogonium.layers.skew_conv import SkewOrthoConv1d, SkewOrthoConv2d, SkewOrthoConv3d
from orthogonium.linalg.kernels import adjoint_kernel

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(conv.OrthoConv1d, conv.OrthoConv2d, conv.OrthoConv3d),
    *(conv_transposed.OrthoConvTranspose1d, conv_transposed.OrthoConvTranspose2d, conv_transposed.OrthoConvTranspose3d),
    *(almost_orthogonal.AOLConv1d, almost_orthogonal.AOLConv2d, almost_orthogonal.AOLConv3d),
    almost_orthogonal.AOLConvTranspose1d,
    almost_orthogonal.AOLConvTranspose2d,
    almost_orthogonal.AOLConvTranspose3d,
)


def _affine(norm: float, absolute: float, terms: int, bias: Tensor | None, matrix: Tensor | None = None) -> Response:
    offset = 0.0 if bias is None else vector_norm(bias)
    entries = 1 if bias is None else bias.numel()
    return Response(norm, Rounding(terms + 1, absolute, offset, entries), matrix=matrix)


def _check_features(x: Variable, features: int) -> None:
    if x.shape is not None and (len(x.shape) < 2 or x.shape[-1] != features):
        raise Refused(f"takes (N, {features}), got {('N', *x.shape[1:])}. Reshape x, or put a Flatten first")


@lipschitz_rule(nn.Linear, OrthoLinear, UnitNormLinear, fresh=True)
def _linear_layer(module: nn.Linear, x: Variable) -> Response:
    _check_features(x, module.in_features)
    return _affine(*module_norms(module, None), module.in_features, module.bias, module.weight.detach())


@lipschitz_rule(F.linear, fresh=True)
def _linear(x: Any, weight: Any, bias: Any = None) -> Response:
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused(
            "has a weight or bias that depends on the network's input: a product of two such is not Lipschitz"
        )
    weight = weight if weight.ndim == 2 else weight[None]
    _check_features(x, weight.shape[1])
    return _affine(matrix_norm(weight), absolute_matrix_norm(weight), weight.shape[1], bias, weight.detach())


@lipschitz_rule(operator.matmul, torch.matmul, torch.mm, "matmul", "mm", "__matmul__", fresh=True)
def _matmul(left: Any, right: Any) -> Response:
    if isinstance(left, Variable) and isinstance(right, Variable):
        raise Refused("multiplies two tensors that both depend on the network's input, which is not Lipschitz")
    x, matrix = (left, right) if isinstance(left, Variable) else (right, left)
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        raise Refused("is known for a constant matrix of two dimensions on one side")
    if x is right:
        if len(x.known_shape("see that the batch is not mixed")) < 3:
            raise Refused("multiplies the batch from the left, which mixes it. Use x @ matrix.T")
        matrix = matrix.mT
    elif x.shape is not None:
        _check_features(x, matrix.shape[0])
    norm, absolute = matrix_norm(matrix), absolute_matrix_norm(matrix)
    return Response(norm, Rounding(matrix.shape[0] + 1, absolute), matrix=matrix.mT.detach() if x is left else None)


@lipschitz_rule(*_CONVOLUTIONS, fresh=True)
def _convolution_layer(module: nn.modules.conv._ConvNd, x: Variable, output_size: Any = None) -> Response:
    _check_image(x, module.in_channels, len(module.stride))
    if output_size is not None:
        raise Refused("is called with output_size. Use output_padding")
    norm, absolute = module_norms(module, None if x.shape is None else x.shape[1:])
    weight: Tensor = module.weight.detach()
    taps = weight[0, 0].numel() * (module.in_channels // module.groups)
    return _affine(norm, absolute, taps, module.bias)


def _check_image(x: Variable, channels: int, dims: int) -> None:
    if x.shape is not None and (len(x.shape) != dims + 2 or x.shape[1] != channels):
        raise Refused(f"takes (N, {channels}, {dims} sides), got {('N', *x.shape[1:])}")


@lipschitz_rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, fresh=True)
def _convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Response:
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused("has a kernel or bias that depends on the network's input: such a product is not Lipschitz")
    dims = weight.ndim - 2
    _check_image(x, weight.shape[1] * groups, dims)
    steps, spread = sizes(stride, dims), sizes(dilation, dims)
    norm, absolute = kernel_norms(
        weight.detach(),
        None if x.shape is None else x.shape[2:],
        steps,
        _pads(padding, spread, weight.shape[2:]),
        spread,
        groups,
    )
    return _affine(norm, absolute, weight[0].numel(), bias)


@lipschitz_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, fresh=True)
def _transposed(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Response:
    """The adjoint of a convolution, cut off at the border, on images of any size."""
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused("has a kernel or bias that depends on the network's input: such a product is not Lipschitz")
    dims = weight.ndim - 2
    _check_image(x, weight.shape[0], dims)
    norm, absolute = kernel_norms(
        weight.detach(), None, sizes(stride, dims), (0,) * dims, sizes(dilation, dims), groups
    )
    return _affine(norm, absolute, weight[:, 0].numel() // groups, bias)


def _pads(padding: Any, dilation: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """Zeros on each side; rounded up for ``"same"``, which computes a part of that."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        return tuple((d * (k - 1) + 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return sizes(padding, len(kernel))


@lipschitz_rule(SkewOrthoConv1d, SkewOrthoConv2d, SkewOrthoConv3d, fresh=True)
def _skew_convolution(module: SkewOrthoConv2d, x: Variable) -> Response:
    """``Σ Aᵏ/k!`` up to the order that the layer sums, whose rest is bounded by the norm of A.

    Where the kernel is skew to the last bit, the whole series is orthogonal; otherwise ``‖exp A‖ ≤ exp ‖(A + A*)/2‖``.
    """
    weight = as_double(module.weight)
    ones = (1,) * len(module.dilation)
    sides = None if x.shape is None else x.shape[2:]
    padding = tuple(before for before, _ in module.geometry.pads)
    size, absolute = kernel_norms(weight, sides, ones, padding, module.dilation, module.groups)
    even = (weight + adjoint_kernel(weight, module.groups)) / 2
    growth = kernel_norms(even, sides, ones, padding, module.dilation, module.groups)[0] if even.any() else 0.0
    terms = module._terms(torch.float32)  # the fewest: what is said covers float32 and float64
    omitted = math.prod(size / order for order in range(1, terms + 2))
    left = omitted / (1 - size / (terms + 2)) * (1 + 2.0**-40) if size < terms + 2 else math.inf
    norm = math.exp(growth) * (1 + 2.0**-50 if growth else 1.0) + left
    taps = weight[0].numel() + 2
    series = math.exp(absolute) * (1 + 2.0**-40)  # of |A|, which bounds every partial sum
    bias = module.bias
    offset = 0.0 if bias is None else vector_norm(bias)
    rounding = Rounding((taps + 2) * terms, series, offset, 1 if bias is None else bias.numel())
    return Response(norm, rounding)
