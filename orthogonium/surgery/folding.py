"""Centrings and channel factors of an exported chain, taken into the linear map before them."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.layers import BatchCentering, GroupSort, LipschitzBatchNorm

# after a Flatten these keep features (batch, features), so that axis 1 is what a linear layer writes
_KEEPS_FLAT = (nn.Linear, GroupSort, nn.ReLU, nn.Tanh, nn.GELU, nn.Dropout, nn.Identity, BatchCentering)


class Uses:
    """How often each module and parameter stands in a model: what is shared cannot be changed for one use."""

    def __init__(self, model: nn.Module) -> None:
        modules = [module for _, module in model.named_modules(remove_duplicate=False)]
        self._modules = Counter(id(module) for module in modules)
        self._tensors = Counter(id(p) for module in model.modules() for p in _tensors(module))

    def once(self, module: nn.Module) -> bool:
        """Whether ``module`` and its tensors have one use, and no hook looks at what passes."""
        unseen = not (module._forward_hooks or module._forward_pre_hooks)
        return self._modules[id(module)] == 1 and unseen and all(self._tensors[id(p)] == 1 for p in _tensors(module))


def _tensors(module: nn.Module) -> list[object]:
    """The parameters of a module itself, and what stands behind its parametrized ones."""
    tied = list(module.parametrizations.values()) if is_parametrized(module) else []  # type: ignore[operator]
    return [*(p for p in module._parameters.values() if p is not None), *tied]


def fold(old: nn.Sequential, new: nn.Sequential, uses: Uses) -> None:
    """Put ``nn.Identity`` in place of each centring in ``new`` that directly follows a linear map with one use.

    A convolution writes channels to axis 1, which is the one that is centred. A linear layer writes to the last, so it
    takes part only where a ``Flatten`` before it says that these are the same.
    """
    flat = False
    names = list(old._modules)
    for before, name in itertools.pairwise(names):
        given, follower = old._modules[before], old._modules[name]
        assert given is not None
        flattens = isinstance(given, nn.Flatten) and given.start_dim == 1 and given.end_dim == -1
        flat = flattens or (flat and isinstance(given, _KEEPS_FLAT))
        fits = isinstance(given, _ConvNd) or (isinstance(given, nn.Linear) and flat)
        if not fits or not isinstance(follower, BatchCentering) or not (uses.once(given) and uses.once(follower)):
            continue
        target = _linear_map(new._modules[before])
        if target is not None:
            _take_in(target, follower)
            new._modules[name] = nn.Identity()


def _linear_map(plain: nn.Module | None) -> Any:
    """The layer itself, or the one behind its padding."""
    last = plain[-1] if isinstance(plain, nn.Sequential) else plain
    return last if isinstance(last, _ConvNd | nn.Linear) else None


def _take_in(layer: Any, centring: BatchCentering) -> None:
    shift = -centring.running_mean
    scale: Tensor | None = None
    if isinstance(centring, LipschitzBatchNorm):
        scale = centring.factors()
        shift = shift * scale
    with torch.no_grad():
        if centring.bias is not None:
            shift = shift + centring.bias
        if scale is not None:
            axis = 1 if isinstance(layer, _ConvNd) and layer.transposed else 0
            layer.weight.copy_(_scaled(layer, scale, axis))
            if layer.bias is not None:
                layer.bias.mul_(scale)
        if layer.bias is None:
            layer.bias = nn.Parameter(shift.clone(), layer.weight.requires_grad)
        else:
            layer.bias.add_(shift)


def _scaled(layer: Any, scale: Tensor, axis: int) -> Tensor:
    """Each output channel of the weight times its factor; of a transposed kernel they lie on axis 1, by group."""
    weight: Tensor = layer.weight
    rest = (1,) * (weight.ndim - 2)
    if axis == 0:
        return weight * scale.view(-1, 1, *rest)
    grouped = weight.unflatten(0, (layer.groups, -1))
    return (grouped * scale.view(layer.groups, 1, -1, *rest)).flatten(0, 1)
