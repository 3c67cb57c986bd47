"""Which ordinary modules have kin that never grow a distance."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from orthogonium.layers import LayerCentering, LipschitzBatchNorm, ScaledAvgPool1d, ScaledAvgPool2d, ScaledAvgPool3d


def _batch_norm(old: Any) -> nn.Module | None:
    """The same statistics, weight and bias; ``None`` without running statistics."""
    if old.running_mean is None:
        return None
    like = {"device": old.running_mean.device, "dtype": old.running_mean.dtype}
    new = LipschitzBatchNorm(old.num_features, old.momentum, old.bias is not None, old.eps, **like)
    with torch.no_grad():
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            value = getattr(old, name)
            if value is not None:
                getattr(new, name).copy_(value)
    return new


def _layer_norm(old: Any) -> nn.Module:
    weight = old.weight
    like = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    new = LayerCentering(old.normalized_shape, old.bias is not None, **like)
    if old.bias is not None:
        with torch.no_grad():
            new.bias.copy_(old.bias)
    return new


def _average(made: Callable[..., nn.Module], dims: int) -> Callable[[Any], nn.Module | None]:
    def swap(old: Any) -> nn.Module | None:
        size, stride, padding = (_sides(value, dims) for value in (old.kernel_size, old.stride, old.padding))
        plain = size == stride and not any(padding) and not old.ceil_mode
        return made(size) if plain and getattr(old, "divisor_override", None) is None else None

    return swap


def _maximum(old: Any) -> nn.Module | None:
    """Windows as large as the stride, as many of them as before on most images; ``None`` where none overlap."""
    dims = int(type(old).__name__[-2])
    size, stride, dilation = (_sides(value, dims) for value in (old.kernel_size, old.stride, old.dilation))
    overlapping = any(k > s for k, s in zip(size, stride, strict=True))
    usable = all(s > 1 for s in stride) and not any(d > 1 for d in dilation) and not old.return_indices
    return type(old)(stride, stride, ceil_mode=True) if overlapping and usable else None


def _sides(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _relu(old: nn.Module) -> nn.Module:
    return nn.ReLU()


LIPSCHITZ_SWAPS: Mapping[type[nn.Module], Callable[[Any], nn.Module | None]] = MappingProxyType(
    {
        nn.BatchNorm1d: _batch_norm,
        nn.BatchNorm2d: _batch_norm,
        nn.BatchNorm3d: _batch_norm,
        nn.LayerNorm: _layer_norm,
        nn.AvgPool1d: _average(ScaledAvgPool1d, 1),
        nn.AvgPool2d: _average(ScaledAvgPool2d, 2),
        nn.AvgPool3d: _average(ScaledAvgPool3d, 3),
        nn.MaxPool1d: _maximum,
        nn.MaxPool2d: _maximum,
        nn.MaxPool3d: _maximum,
        nn.GELU: _relu,
        nn.SiLU: _relu,
        nn.Mish: _relu,
        nn.Hardswish: _relu,
    }
)
"""Batch norm to :class:`LipschitzBatchNorm`, layer norm to :class:`LayerCentering`, average pooling to its scaled form,
overlapping max pooling to windows that do not overlap, and activations steeper than one to ReLU."""
