"""The norm of one linear or convolution layer as an operator, from above, whatever holds its weight."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.certification._orthogonal_norm import orthogonal_kernel_bound
from orthogonium.certification.rules.registry import plain_type
from orthogonium.layers.conv import _OrthoKernelLayer, _PaddedConv
from orthogonium.layers.conv_transposed import _PaddedConvTranspose
from orthogonium.layers.skew_conv import _SkewOrthoConv
from orthogonium.linalg import absolute_kernel_norm_bound, kernel_norm_bound, spectral_norm_bound
from orthogonium.linalg.kernels import adjoint_kernel
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS

_UP = 1 + 2.0**-40  # covers a few dozen float64 roundings
_FORWARDS = (
    nn.Linear.forward,
    *(known.forward for known in CONVOLUTIONS),
    _PaddedConv.forward,
    _PaddedConvTranspose.forward,
    _SkewOrthoConv.forward,
)


def operator_norm_bound(
    module: nn.Module, input_shape: Sequence[int] | None = None, *, stride_divides: bool = False
) -> float:
    """Never below the ℓ2 operator norm of a layer's linear part, with the weight as the layer computes it now.

    For this library's orthogonal convolutions that is one to rounding on every image that they accept, known or not.

    Args:
        module: :class:`torch.nn.Linear`, a convolution of torch, transposed or not, or a linear or convolution layer of
            this library; parametrized or plain.
        input_shape: ``(..., channels, *sides)`` of what a convolution is applied to. Without it the bound holds on
            every image that the layer accepts, and is larger; see
            :func:`~orthogonium.linalg.kernel_bound.kernel_norm_bound`. A transposed convolution is meant with its own
            ``output_padding``, not with an ``output_size`` in the call.
        stride_divides: without ``input_shape``: only images whose sides the stride divides are meant. It matters for
            circular padding, where others cost a factor, and not for orthogonal layers.

    Raises:
        TypeError: a module of another type, or with a forward of its own; a complex weight.
        NonFiniteError: a weight that holds NaN or Inf.
        ValueError: an input that the layer refuses.

    Source: Singla and Feizi, "Skew orthogonal convolutions", ICML 2021, for the remainder of a skew exponential.
    """
    weight = _weight(module)
    if isinstance(module, nn.Linear):
        _check_features(module, input_shape)
        return float(spectral_norm_bound(weight))
    norm = kernel_norm_bound(weight, **_arguments(module, input_shape, stride_divides))
    if isinstance(module, _SkewOrthoConv):
        return _series_bound(module, weight, norm)
    if isinstance(module, _OrthoKernelLayer) and module._exact:
        return min(norm, orthogonal_kernel_bound(weight, module.geometry.stride, module.groups))
    return norm


def absolute_norm_bound(
    module: nn.Module, input_shape: Sequence[int] | None = None, *, stride_divides: bool = False
) -> float:
    """Never below ``‖ |W| ‖₂``, the norm of the operator of absolute values, which forward errors grow with.

    For a skew convolution, whose series is summed on the features, it is a bound on the sum of the absolute values of
    the series' terms, ``exp(‖ |A| ‖₂)``.

    Args:
        module, input_shape, stride_divides: as in :func:`operator_norm_bound`, and the same errors.
    """
    weight = _weight(module)
    if isinstance(module, nn.Linear):
        _check_features(module, input_shape)
        return float(spectral_norm_bound(weight.abs()))
    norm = absolute_kernel_norm_bound(weight, **_arguments(module, input_shape, stride_divides))
    return _exponential(norm) if isinstance(module, _SkewOrthoConv) else norm


def _weight(module: nn.Module) -> Tensor:
    kind = plain_type(module)
    known = isinstance(module, (nn.Linear, *CONVOLUTIONS, _SkewOrthoConv))
    if not known or kind.forward not in _FORWARDS or "forward" in vars(module):
        reason = "has a forward of its own" if known else "is no linear or convolution layer"
        raise TypeError(
            f"module must be nn.Linear, a convolution of torch or a linear or convolution layer of this library, "
            f"got {kind.__name__}, which {reason}"
        )
    with torch.no_grad():
        weight = module.weight
    assert isinstance(weight, Tensor)
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise ValueError(f"the weight of this {kind.__name__} has no values yet. Materialise it first")
    return weight.detach()


def _check_features(module: nn.Linear, input_shape: Sequence[int] | None) -> None:
    if input_shape is not None and (len(input_shape) == 0 or input_shape[-1] != module.in_features):
        raise ValueError(f"input_shape must be (..., {module.in_features}), got {tuple(input_shape)}")


def _arguments(module: Any, input_shape: Sequence[int] | None, stride_divides: bool) -> dict[str, Any]:
    dims = len(module.kernel_size)
    sides = None
    if input_shape is not None:
        shape = tuple(input_shape)
        if len(shape) <= dims or shape[-dims - 1] != module.in_channels:
            raise ValueError(f"input_shape must be (..., {module.in_channels}, {dims} sides), got {shape}")
        sides = shape[-dims:]
    found: dict[str, Any] = {"image_size": sides, "groups": module.groups, "stride_divides": stride_divides}
    geometry = getattr(module, "geometry", None)
    if geometry is None:  # of torch
        found |= {"stride": module.stride, "dilation": module.dilation, "padding": module.padding}
        found["padding_mode"] = module.padding_mode
        if module.padding_mode != "zeros" and isinstance(module.padding, tuple):
            used = tuple(module._reversed_padding_repeated_twice)
            if used != tuple(side for side in reversed(module.padding) for _ in range(2)):
                raise ValueError(
                    f"padding={module.padding} was set after the layer was made, which pads by {used} with "
                    f"padding_mode={module.padding_mode!r}. Make a new layer"
                )
    else:
        found |= {"stride": geometry.stride, "dilation": geometry.dilation, "padding": geometry.pads}
        found["padding_mode"] = "circular" if geometry.circular else "zeros"
    if getattr(module, "transposed", False):
        filled = getattr(module, "_filled", (0,) * dims)
        more = tuple(extra + more for extra, more in zip(module.output_padding, filled, strict=True))
        found |= {"transposed": True, "output_padding": more}
    return found


def _series_bound(module: _SkewOrthoConv, weight: Tensor, norm: float) -> float:
    """Of ``Σ_j A^j / j!`` up to a last order, with ``‖A‖ ≤ norm``.

    The eigenvalues of a skew ``A`` are imaginary, ``iθ``, and the rest of the series of ``e^(iθ)`` is at most
    ``|θ|^(T+1) / (T+1)!``. A weight that is not exactly skew has ``e^norm``.
    """
    orders = module._terms(weight.dtype) + 1
    if not bool((adjoint_kernel(weight, module.groups) == -weight).all()):
        return _exponential(norm)
    rest = 1.0
    for order in range(1, orders + 1):
        rest *= norm / order * _UP
    return min((1 + rest) * (1 + 2.0**-51), _exponential(norm))


def _exponential(exponent: float) -> float:
    return _guarded(math.exp, exponent) * _UP


def _guarded(function: Callable[[float], float], value: float) -> float:
    try:
        return function(value)
    except OverflowError:
        return math.inf
