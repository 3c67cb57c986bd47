"""Read a Sequential as a chain of maps whose Lipschitz constant and rounding are known."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthogonium.certification.matrix_norms import _absolute_norm_upper_bound, _norm_upper_bound
from orthogonium.layers import GroupSort, MaxMin

# They move or compare numbers and so round nothing, and are 1-Lipschitz for ℓ2.
_EXACT = (nn.Identity, nn.Flatten, nn.ReLU, GroupSort, MaxMin)


@dataclass(frozen=True)
class Link:
    """One map of the chain, with what a certificate needs to know about it.

    ``plain`` computes it in float64 with no parametrization; ``norm`` and ``absolute_norm`` are upper
    bounds on ``‖W‖₂`` and ``‖|W|‖₂`` (both 1 for an exact activation), ``bias_norm`` on ``‖b‖``.
    """

    path: str
    kind: str
    plain: nn.Module
    norm: float = 1.0
    absolute_norm: float = 1.0
    bias_norm: float = 0.0


def read_sequential(model: nn.Module) -> list[Link]:
    """The chain of maps that ``model`` computes in evaluation mode, weights copied to float64.

    A constrained weight is read once, in the model's own precision, and converted exactly: the chain is
    the network with precisely those weights.

    Args:
        model: :class:`torch.nn.Sequential`, nested at will, of linear layers (constrained or not),
            :class:`GroupSort`, :class:`MaxMin`, ReLU, Flatten, Identity and Dropout; or one such layer.

    Raises:
        TypeError: a module is of another type, or carries hooks that could change what it computes; the
            message names its path.
        ValueError: ``model`` is in training mode, a weight is complex or not finite, or Flatten merges
            the batch.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, where it may compute something else. Call model.eval()")
    return [_link(path, module) for path, module in _flat(model, "")]


def plain_network(links: list[Link]) -> nn.Sequential:
    """The chain as ordinary float64 torch modules that share no memory with the model."""
    return nn.Sequential(*(link.plain for link in links)).eval()


def _flat(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    name = path or "the model itself"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise TypeError(
            f"{name} ({type(module).__name__}) has forward hooks, or a forward of its own, which can change "
            f"its output. Remove them"
        )
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for key, child in module._modules.items():  # named_children leaves out a module's second use
            assert child is not None  # Sequential holds modules only
            yield from _flat(child, f"{path}.{key}" if path else key)
    else:
        yield name, module


def _link(path: str, module: nn.Module) -> Link:
    kind = type(module).__name__.removeprefix("Parametrized")
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _linear(path, kind, module)
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        raise ValueError(f"{path} (Flatten) has start_dim=0, which merges the batch. Use start_dim=1")
    if isinstance(module, GroupSort) and module.dim == 0:
        raise ValueError(f"{path} ({kind}) has dim=0, which mixes the batch. Use dim=1")
    if type(module) in _EXACT:
        return Link(path, kind, module)
    if type(module) is nn.Dropout:  # the identity, in evaluation mode
        return Link(path, kind, nn.Identity())
    raise TypeError(
        f"{path} is a {kind}, whose Lipschitz constant is not known here. "
        f"Known: Sequential of linear layers, GroupSort, MaxMin, ReLU, Flatten, Identity, Dropout"
    )


def _linear(path: str, kind: str, module: nn.Linear) -> Link:
    with torch.no_grad():
        weight, bias = module.weight.detach(), module.bias
    if weight.is_complex():
        raise ValueError(f"{path} ({kind}) has a complex weight; certificates are for real networks")
    values = [("weight", weight)] if bias is None else [("weight", weight), ("bias", bias)]
    for name, value in values:
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}.{name} ({kind}) holds NaN or infinite entries: nothing can be certified")
    plain = nn.utils.skip_init(
        nn.Linear, module.in_features, module.out_features, bias=bias is not None, dtype=torch.float64
    )
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    plain.requires_grad_(False)
    return Link(
        path,
        kind,
        plain,
        norm=_norm_upper_bound(weight),
        absolute_norm=_absolute_norm_upper_bound(weight),
        bias_norm=0.0 if bias is None else _vector_norm(bias),
    )


def _vector_norm(vector: Tensor) -> float:
    """Never below ``‖v‖₂``."""
    return _norm_upper_bound(vector.detach()[None]) if vector.numel() else 0.0


def product(links: list[Link]) -> float:
    """The product of the norms, rounded up: a Lipschitz constant of the whole chain."""
    bound = 1.0
    for link in links:
        bound = math.nextafter(bound * link.norm, math.inf) if link.norm != 1.0 else bound
    return bound
