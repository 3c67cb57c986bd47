"""Rules for linear layers and convolutions."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.operators import kernel_norms, matrix_norms, module_norms, vector_norm
from orthogonium.certification.rules.registry import (
    Refused,
    Response,
    Rounding,
    Variable,
    lipschitz_rule,
)
from orthogonium.layers import almost_orthogonal, conv, conv_transposed
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear
from orthogonium.layers.skew_conv import SkewOrthoConv1d, SkewOrthoConv2d, SkewOrthoConv3d
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS

_WITH_KERNELS = (
    *CONVOLUTIONS,
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


def check_features(x: Variable, features: int) -> None:
    if x.shape is not None and (len(x.shape) < 2 or x.shape[-1] != features):
        raise Refused(f"takes (N, {features}), got {('N', *x.shape[1:])}. Reshape x, or put a Flatten first")


@lipschitz_rule(nn.Linear, OrthoLinear, UnitNormLinear, fresh=True)
def _linear_layer(module: nn.Linear, x: Variable) -> Response:
    check_features(x, module.in_features)
    return _affine(*module_norms(module, None), module.in_features, module.bias, module.weight.detach())


@lipschitz_rule(F.linear, fresh=True)
def _linear(x: Any, weight: Any, bias: Any = None) -> Response:
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused(
            "has a weight or bias that depends on the network's input: a product of two such is not Lipschitz"
        )
    weight = weight if weight.ndim == 2 else weight[None]
    check_features(x, weight.shape[1])
    return _affine(*matrix_norms(weight), weight.shape[1], bias, weight.detach())


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
        check_features(x, matrix.shape[0])
    norm, absolute = matrix_norms(matrix)
    return Response(norm, Rounding(matrix.shape[0] + 1, absolute), matrix=matrix.mT.detach() if x is left else None)


@lipschitz_rule(*_WITH_KERNELS, fresh=True)
def _convolution_layer(module: nn.modules.conv._ConvNd, x: Variable, output_size: Any = None) -> Response:
    check_image(x, module.in_channels, len(module.stride))
    if output_size is not None:
        raise Refused("is called with output_size. Use output_padding")
    norm, absolute = module_norms(module, None if x.shape is None else x.shape[1:])
    weight: Tensor = module.weight.detach()
    taps = weight[0, 0].numel() * (module.in_channels // module.groups)
    return _affine(norm, absolute, taps, module.bias)


def check_image(x: Variable, channels: int, dims: int) -> None:
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
    check_image(x, weight.shape[1] * groups, weight.ndim - 2)
    geometry = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    norm, absolute = kernel_norms(weight.detach(), image_size=None if x.shape is None else x.shape[2:], **geometry)
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
    if not isinstance(x, Variable) or isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused("has a kernel or bias that depends on the network's input: such a product is not Lipschitz")
    check_image(x, weight.shape[0], weight.ndim - 2)
    geometry = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
    geometry |= {"transposed": True, "output_padding": output_padding}
    norm, absolute = kernel_norms(weight.detach(), image_size=None if x.shape is None else x.shape[2:], **geometry)
    return _affine(norm, absolute, weight[:, 0].numel() // groups, bias)


@lipschitz_rule(SkewOrthoConv1d, SkewOrthoConv2d, SkewOrthoConv3d, fresh=True)
def _skew_convolution(module: SkewOrthoConv2d, x: Variable) -> Response:
    """A series of convolutions. One in float32 ends earlier, by a quarter of its rounding, which ``terms`` cover."""
    norm, absolute = module_norms(module, None if x.shape is None else x.shape[1:])
    weight: Tensor = module.weight.detach()
    terms = (weight[0].numel() + 2) * module._terms(torch.float64)
    bias = module.bias
    offset, entries = (0.0, 1) if bias is None else (vector_norm(bias), bias.numel())
    return Response(norm, Rounding(terms, absolute, offset, entries))
