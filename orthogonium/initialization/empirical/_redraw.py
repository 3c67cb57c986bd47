"""Fresh Gaussian weights, for those who ask for them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.initialization.empirical.folding import is_normalization


def redraw_weights(modules: Iterable[nn.Module]) -> None:
    """Matrices and kernels from a Gaussian with variance one over the fan-in, biases zero, in place.

    Normalisation layers, vectors that are no biases, and frozen parameters stay as they are. The weights of an
    embedding get variance one, as a lookup sums nothing.
    """
    with torch.no_grad():
        for module in modules:
            for part in module.modules():
                if not is_normalization(part):
                    _redraw(part)


def _redraw(module: nn.Module) -> None:
    if is_parametrized(module):
        for name, hooks in module.parametrizations.items():  # type: ignore[union-attr, operator]
            if any(p.requires_grad for p in hooks.parameters()):
                weight: Tensor = getattr(module, name)
                setattr(module, name, _draw(module, name, weight.detach().clone()))
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            continue
        if "bias" in name.lower():
            parameter.zero_()
        elif parameter.ndim >= 2:
            _draw(module, name, parameter)


def _draw(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return weight
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        fan_in = 1
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        fan_in = weight[:, 0].numel() // module.groups
    else:
        fan_in = weight[0].numel()
    return weight.copy_(torch.randn_like(weight) * max(fan_in, 1) ** -0.5)
