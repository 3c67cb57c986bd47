"""Scales moved from wrappers into the weights."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.initialization.empirical._updates import kept
from orthogonium.initialization.empirical.normed import get_wrapped_submodules
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS

Model = TypeVar("Model", bound=nn.Module)

_NORMALIZATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LINEAR_IN_WEIGHTS = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    *CONVOLUTIONS,
    *_NORMALIZATION,
)


def is_normalization(module: nn.Module) -> bool:
    return isinstance(module, _NORMALIZATION)


def fold_scales(model: Model) -> Model:
    """Multiply activation scales into the weights and take the wrappers away, in place; outputs stay the same.

    What remains is the ordinary model with other weights, and nothing of this in its forward pass. Gradient and update
    scales have no place in weights: the gradient is the true one afterwards, and
    :func:`orthogonium.diagnostics.layerwise_lr` turns the sizes of updates into learning rates.

    A wrapper stays, with its activation scale alone, where weights cannot hold it: recurrent layers, modules that are
    not known to be linear in their weights, orthogonal and otherwise constrained weights, frozen weights, and those
    that several modules share. ``get_wrapped_submodules(model)`` lists them.

    Args:
        model: with :class:`Normed` inside.

    Returns:
        ``model``; the module itself where the model was one wrapper.
    """
    for wrapper in get_wrapped_submodules(model):
        scales = wrapper.activation_scale.tolist()
        wrapper.set_scales(scales, scales, 1.0)
        if any(scale != 1 for scale in scales):
            if len(scales) > 1 and not isinstance(wrapper.module, nn.MultiheadAttention):
                continue
            if why_not(wrapper.module, model):
                continue
            multiply_weights(wrapper.module, scales[0])
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is wrapper:
                    parent._modules[name] = wrapper.module
        if wrapper is model:
            return wrapper.module  # type: ignore[return-value]
    return model


def why_not(module: nn.Module, model: nn.Module) -> str:
    """Why ``module``'s outputs cannot be scaled through its weights; empty if they can."""
    target = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    with kept(list(target.buffers())):  # reading a constrained weight may move its estimates
        return _obstacle(target, model)


def _obstacle(target: nn.Module, model: nn.Module) -> str:
    kind = next((k for k in _LINEAR_IN_WEIGHTS if isinstance(target, k)), None)
    if kind is None or not _defines_forward(target).__module__.startswith("torch.nn."):
        return "not known to be linear in its weights"
    if getattr(target, "max_norm", None) is not None:
        return "rows are renormalised"
    if not _own(target):
        return "no weights"
    parameters = [p for name in _own(target) for p in _behind(target, name)]
    if not all(p.requires_grad for p in parameters):
        return "frozen"
    ours = {id(p) for p in parameters}
    owners = sum(id(p) in ours for m in model.modules() for p in m._parameters.values() if p is not None)
    if owners > len(ours):
        return "weights shared with another module"
    if is_parametrized(target) and not _constraint_lets_through(target):
        return "constrained weights keep their size"
    return ""


def multiply_weights(module: nn.Module, factor: float) -> None:
    """Scale weight and bias, so that the outputs are ``factor`` times as large; see :func:`why_not` first."""
    target = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
    with torch.no_grad():
        for name in _own(target):
            value: Tensor = getattr(target, name)
            if is_parametrized(target, name):
                setattr(target, name, value * factor)
            else:
                value.mul_(factor)


def _defines_forward(module: nn.Module) -> type:
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def _own(module: nn.Module) -> list[str]:
    return [name for name in ("weight", "bias") if isinstance(getattr(module, name, None), Tensor)]


def _behind(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters that make ``module.name``."""
    if is_parametrized(module, name):
        return list(module.parametrizations[name].parameters())  # type: ignore[index, union-attr]
    return [getattr(module, name)]


def _constraint_lets_through(module: nn.Module) -> bool:
    """Whether assigning twice a parametrized weight gives twice the weight back; everything is put back afterwards."""
    hooks = module.parametrizations
    before = {key: value.clone() for key, value in hooks.state_dict().items()}  # type: ignore[union-attr]
    with torch.no_grad():
        for name in _own(module):
            if not is_parametrized(module, name):
                continue
            weight = getattr(module, name).clone()
            try:
                setattr(module, name, 2 * weight)
            except (NotImplementedError, RuntimeError, ValueError):  # how torch says that there is no way back
                return False
            found = getattr(module, name).clone()
            hooks.load_state_dict(before)  # type: ignore[union-attr]
            if not torch.allclose(found, 2 * weight, rtol=1e3 * torch.finfo(weight.dtype).eps, atol=0):
                return False
    return True
