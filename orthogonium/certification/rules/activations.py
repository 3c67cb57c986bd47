"""Rules for activations, with the largest absolute slope of each.

Evaluations are taken to be within 4 units in the last place of the elementary functions behind them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.rounding import sqrt_up
from orthogonium.certification.rules.registry import (
    EXACT,
    UNCHANGED,
    Refused,
    Response,
    Rounding,
    Unknown,
    Variable,
    evaluate_only,
    limited,
    lipschitz_rule,
    no_dtype,
    number,
)
from orthogonium.layers import GroupSort, MaxMin

# Largest slopes of smooth activations, rounded up. The first is Φ(√2) + √2 φ(√2), at √2; the others are extrema found
# to 30 digits, at 1.4185, 2.3994 and 1.4906.
_GELU, _GELU_TANH, _SILU, _MISH = 1.128904145185155, 1.128993068658772, 1.099839320128867, 1.088498161251728
_SELU = 1.0507009873554805 * 1.6732632423543774
_TERMS = 16
_RANGE = 80.0  # of logarithms whose exponentials stay normal numbers in float32


def _smooth(slope: float, at_zero: float = 0.0, absolute: float | None = None, constant: float = 0.0) -> Response:
    """An elementwise function with ``|f(x)| ≤ |f(0)| + slope |x|``, computed to a few roundings of that."""
    size = slope if absolute is None else absolute
    return Response(slope, Rounding(_TERMS, size, at_zero, constant=constant))


def _exact(slope: float) -> Response:
    """One multiplication at most."""
    return Response(slope, EXACT if slope in (0, 1) else Rounding(2, slope))


@lipschitz_rule(
    *(nn.ReLU, nn.ReLU6, F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, torch.abs, torch.neg, torch.positive),
    *("relu", "relu_", "abs", "__abs__", "neg", "__neg__", "__pos__"),
)
def _piecewise(*args: Any, **kwargs: Any) -> Response:
    return Response(1.0, EXACT)


@lipschitz_rule(nn.Hardtanh)
def _hardtanh_layer(module: nn.Hardtanh, x: Variable) -> Response:
    return _hardtanh(x, module.min_val, module.max_val)


@lipschitz_rule(F.hardtanh)
def _hardtanh(x: Variable, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Response:
    return Response(1.0, limited(min_val, max_val))


@lipschitz_rule(nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Tanh, nn.LogSigmoid, fresh=True)
@lipschitz_rule(F.softshrink, F.softsign, F.tanhshrink, F.tanh, torch.tanh, F.logsigmoid, "tanh", fresh=True)
@lipschitz_rule(torch.sin, torch.cos, torch.atan, torch.asinh, "sin", "cos", "atan", fresh=True)
def _slope_one(*args: Any, **kwargs: Any) -> Response:
    return _smooth(1.0, 1.0)


@lipschitz_rule(nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", fresh=True)
def _sigmoid(*args: Any) -> Response:
    return _smooth(0.25, 0.5)


@lipschitz_rule(nn.Hardsigmoid, F.hardsigmoid, fresh=True)
def _hardsigmoid(*args: Any, **kwargs: Any) -> Response:
    return _smooth((1 + 2.0**-23) / 6, 0.5, 1.0)  # some kernels of torch hold 1/6 in float32


@lipschitz_rule(nn.Hardswish, F.hardswish, fresh=True)
def _hardswish(*args: Any, **kwargs: Any) -> Response:
    return _smooth(1.5)


@lipschitz_rule(nn.SiLU, F.silu, fresh=True)
def _silu(*args: Any, **kwargs: Any) -> Response:
    return _smooth(_SILU)


@lipschitz_rule(nn.Mish, F.mish, fresh=True)
def _mish(*args: Any, **kwargs: Any) -> Response:
    return _smooth(_MISH)


@lipschitz_rule(nn.SELU, F.selu, torch.selu, fresh=True)
def _selu(*args: Any, **kwargs: Any) -> Response:
    return _smooth(_SELU * (1 + 2.0**-50))


@lipschitz_rule(torch.erf, "erf", fresh=True)
def _erf(*args: Any) -> Response:
    return _smooth(2 / math.sqrt(math.pi) * (1 + 2.0**-50))


@lipschitz_rule(nn.GELU)
def _gelu_layer(module: nn.GELU, x: Variable) -> Response:
    return _gelu(x, module.approximate)


@lipschitz_rule(F.gelu, fresh=True)
def _gelu(x: Variable, approximate: str = "none") -> Response:
    return _smooth(_GELU if approximate == "none" else _GELU_TANH)


@lipschitz_rule(nn.Softplus)
def _softplus_layer(module: nn.Softplus, x: Variable) -> Response:
    return _softplus(x, module.beta, module.threshold)


@lipschitz_rule(F.softplus, fresh=True)
def _softplus(x: Variable, beta: Any = 1, threshold: Any = 20) -> Response:
    """Slope one. Above its threshold torch returns x, which is less by log(1 + exp(−threshold)) / beta: an error.

    That is 2e-9 for torch's threshold of 20. A larger one is a jump, and no constant exists. Below a high threshold the
    exponential overflows, in float32 from 88 on.
    """
    beta, threshold = number(beta, "beta"), number(threshold, "threshold")
    if not beta > 0:
        raise Refused(f"has beta={beta}. Use a positive one")
    jump = math.log1p(math.exp(-threshold)) / beta * (1 + 2.0**-40) if threshold > -700 else math.inf
    if jump * beta > 1e-6:
        raise Refused(f"jumps by {jump:.3g} at its threshold={threshold}. Use threshold=20, as torch does")
    return Response(1.0) if threshold > _RANGE else _smooth(1.0, 1 / beta, 2.0, constant=jump)


@lipschitz_rule(nn.ELU, nn.CELU)
def _elu_layer(module: nn.ELU | nn.CELU, x: Variable) -> Response:
    return _elu(x, module.alpha) if isinstance(module, nn.ELU) else _celu(x, module.alpha)


@lipschitz_rule(F.elu, fresh=True)
def _elu(x: Variable, alpha: Any = 1.0, inplace: bool = False) -> Response:
    return _smooth(max(1.0, abs(number(alpha, "alpha"))), 0.0)


@lipschitz_rule(F.celu, torch.celu, fresh=True)
def _celu(x: Variable, alpha: Any = 1.0, inplace: bool = False) -> Response:
    if not number(alpha, "alpha") > 0:
        raise Refused(f"has alpha={alpha}. Use a positive one")
    return _smooth(1.0)


@lipschitz_rule(nn.LeakyReLU)
def _leaky_layer(module: nn.LeakyReLU, x: Variable) -> Response:
    return _leaky(x, module.negative_slope)


@lipschitz_rule(F.leaky_relu)
def _leaky(x: Variable, negative_slope: Any = 0.01, inplace: bool = False) -> Response:
    slope = max(1.0, abs(number(negative_slope, "negative_slope")))
    return Response(slope, Rounding(2, slope))


@lipschitz_rule(nn.RReLU)
def _random_leaky_layer(module: nn.RReLU, x: Variable) -> Response:
    slope = max(1.0, abs(module.lower), abs(module.upper))
    return Response(slope, Rounding(4, slope))


@lipschitz_rule(nn.PReLU)
def _prelu_layer(module: nn.PReLU, x: Variable) -> Response:
    return _prelu(x, module.weight)


@lipschitz_rule(F.prelu, torch.prelu, fresh=True)
def _prelu(x: Variable, weight: Tensor) -> Response:
    if isinstance(weight, Variable):
        raise Refused("has slopes that depend on the network's input")
    slope = max(1.0, float(weight.detach().abs().max()))
    return Response(slope, Rounding(2, slope))


@lipschitz_rule(nn.Threshold)
def _threshold_layer(module: nn.Threshold, x: Variable) -> Response:
    return _threshold(x, module.threshold, module.value)


@lipschitz_rule(F.threshold, torch.threshold)
def _threshold(x: Variable, threshold: Any, value: Any, inplace: bool = False) -> Response:
    if threshold != value:
        raise Refused(f"jumps from {value} to {threshold}, so that it has no constant. Use value={threshold}")
    return Response(1.0, limited(threshold, None))


@lipschitz_rule(nn.Softmax, nn.Softmin, nn.LogSoftmax, fresh=True)
def _softmax_layer(module: Any, x: Variable) -> Response:
    if module.dim is None:
        raise Refused("has dim=None. Say which")
    return _log_softmax(x, module.dim) if isinstance(module, nn.LogSoftmax) else _softmax(x, module.dim)


@lipschitz_rule(nn.Softmax2d, fresh=True)
def _softmax_2d(module: nn.Softmax2d, x: Variable) -> Response:
    return _softmax(x, -3)


@lipschitz_rule(torch.softmax, "softmax", fresh=True)
def _typed_softmax(x: Variable, dim: int, dtype: Any = None) -> Response:
    return _softmax(x, dim, dtype=dtype)


@lipschitz_rule(torch.log_softmax, "log_softmax", fresh=True)
def _typed_log_softmax(x: Variable, dim: int, dtype: Any = None) -> Response:
    return _log_softmax(x, dim, dtype=dtype)


@lipschitz_rule(F.softmax, F.softmin, fresh=True)
def _softmax(x: Variable, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Response:
    """The Jacobian ``diag p − p pᵀ`` has norm at most 1/2."""
    no_dtype(dtype)
    x.axis(dim)
    if x.shape is None:
        return Response(0.5)
    length = x.length(dim)
    return Response(0.5, Rounding(length + _TERMS, 4.0, 1.0, entries=length))


@lipschitz_rule(F.log_softmax, fresh=True)
def _log_softmax(x: Variable, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Response:
    """The Jacobian ``I − 1 pᵀ`` has norm at most √n, as p runs to a corner."""
    no_dtype(dtype)
    length = x.length(dim)
    root = sqrt_up(length)
    return Response(root, Rounding(length + _TERMS, 6 * root, root * (1 + math.log(length)), entries=length))


@lipschitz_rule(torch.logsumexp, "logsumexp", fresh=True)
def _logsumexp(x: Variable, dim: Any, keepdim: bool = False) -> Response:
    length = x.length(*([dim] if isinstance(dim, int) else dim))
    return Response(1.0, Rounding(length + _TERMS, 6.0, 1 + math.log(length)))


@lipschitz_rule(
    torch.clamp,
    torch.clip,
    "clamp",
    "clip",
)
def _clamp(x: Any, min: Any = None, max: Any = None) -> Response:
    if isinstance(min, Variable | Tensor) or isinstance(max, Variable | Tensor):
        raise Refused("has limits that are tensors. Use torch.maximum and torch.minimum")
    return Response(1.0, None if isinstance(min, Unknown) or isinstance(max, Unknown) else limited(min, max))


@lipschitz_rule(torch.clamp_min, "clamp_min")
def _clamp_min(x: Any, min: Any) -> Response:
    return _clamp(x, min)


@lipschitz_rule(torch.clamp_max, "clamp_max")
def _clamp_max(x: Any, max: Any) -> Response:
    return _clamp(x, None, max)


@lipschitz_rule(GroupSort, MaxMin, fresh=True)
def _group_sort(module: GroupSort, x: Variable) -> Response:
    x.axis(module.dim)
    return Response(1.0, EXACT)


@lipschitz_rule(
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
def _unchanged_layer(module: nn.Module, x: Variable) -> Response:
    return UNCHANGED


@lipschitz_rule(F.alpha_dropout, F.feature_alpha_dropout)
def _alpha_dropout(x: Variable, p: float = 0.5, training: bool = False, inplace: bool = False) -> Response:
    evaluate_only(training, "dropout")
    return UNCHANGED


@lipschitz_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(x: Variable, p: float = 0.5, training: bool = True, inplace: bool = False) -> Response:
    evaluate_only(training, "dropout")
    return UNCHANGED


@lipschitz_rule(torch.dropout)
def _torch_dropout(x: Variable, p: float, train: bool) -> Response:
    evaluate_only(train, "dropout")
    return UNCHANGED
