"""Read a Sequential as a chain of maps whose Lipschitz constant and rounding are known."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthogonium.certification.operator_norm import absolute_norm_bound, operator_norm_bound
from orthogonium.layers import GroupSort, MaxMin
from orthogonium.layers.conv import _PaddedConv
from orthogonium.linalg import spectral_norm_bound
from orthogonium.linalg.kernels import convolve

# They move or compare numbers and so round nothing, and are 1-Lipschitz for ℓ2.
_EXACT = (nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, GroupSort, MaxMin)


@dataclass(frozen=True)
class Link:
    """One map of the chain, with what a certificate needs to know about it.

    ``plain`` computes it in float64 with no parametrization; ``norm`` and ``absolute_norm`` are upper
    bounds on ``‖W‖₂`` and ``‖|W|‖₂`` (both 1 for an exact activation), ``bias_norm`` on ``‖b‖`` (of a
    convolution, at one position); ``terms`` is the length of its sums, 0 where nothing is rounded.
    """

    path: str
    kind: str
    plain: nn.Module
    norm: float = 1.0
    absolute_norm: float = 1.0
    bias_norm: float = 0.0
    terms: int = 0


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
    if isinstance(module, _PaddedConv) and type(module).forward is _PaddedConv.forward:
        return _convolution(path, kind, module)
    if isinstance(module, nn.Unflatten) and module.dim == 0:
        raise ValueError(f"{path} (Unflatten) has dim=0, which splits the batch. Use dim=1")
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
        f"Known: Sequential of linear layers, this library's convolutions, GroupSort, MaxMin, ReLU, Flatten, "
        f"Unflatten, Identity, Dropout"
    )


class PlainConvolution(nn.Module):
    """A convolution in float64 with its padding, on images whose sides the stride divides, where the bound holds."""

    weight: Tensor

    def __init__(self, module: _PaddedConv, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.geometry, self.groups, self.in_channels = module.geometry, module.groups, module.in_channels
        self.register_buffer("weight", weight.to("cpu", torch.float64))
        self.register_buffer("bias", None if bias is None else bias.detach().to("cpu", torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        geometry, dims = self.geometry, self.weight.ndim - 2
        sides = images.shape[2:]
        if images.ndim != dims + 2 or images.shape[1] != self.in_channels:
            raise ValueError(f"a convolution takes (N, {self.in_channels}, {dims} sides), got {tuple(images.shape)}")
        geometry.check_sides(sides)
        if geometry.circular and any(n % s for n, s in zip(sides, geometry.stride, strict=True)):
            raise ValueError(
                f"a circular convolution of stride {geometry.stride} is certified on sides that it divides, "
                f"got {tuple(sides)}"
            )
        around = [p for pair in reversed(geometry.pads) for p in pair]
        wide = nn.functional.pad(images, around, mode="circular" if geometry.circular else "constant")
        return convolve(
            wide, self.weight, bias=self.bias, stride=geometry.stride, dilation=geometry.dilation, groups=self.groups
        )


def _convolution(path: str, kind: str, module: _PaddedConv) -> Link:
    weight, bias = _finite_parameters(path, kind, module)
    return Link(
        path,
        kind,
        PlainConvolution(module, weight, bias),
        norm=operator_norm_bound(module, stride_divides=True),
        absolute_norm=absolute_norm_bound(module, stride_divides=True),
        bias_norm=0.0 if bias is None else _vector_norm(bias),
        terms=weight[0].numel(),
    )


def _finite_parameters(path: str, kind: str, module: nn.Linear | _PaddedConv) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        weight, bias = module.weight.detach(), module.bias
    if weight.is_complex():
        raise ValueError(f"{path} ({kind}) has a complex weight; certificates are for real networks")
    values = [("weight", weight)] if bias is None else [("weight", weight), ("bias", bias)]
    for name, value in values:
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}.{name} ({kind}) holds NaN or infinite entries: nothing can be certified")
    return weight, bias


def _linear(path: str, kind: str, module: nn.Linear) -> Link:
    weight, bias = _finite_parameters(path, kind, module)
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
        norm=operator_norm_bound(module),
        absolute_norm=absolute_norm_bound(module),
        bias_norm=0.0 if bias is None else _vector_norm(bias),
        terms=module.in_features,
    )


def _vector_norm(vector: Tensor) -> float:
    """Never below ``‖v‖₂``."""
    return float(spectral_norm_bound(vector[None]))


def product(links: list[Link]) -> float:
    """The product of the norms, rounded up: a Lipschitz constant of the whole chain."""
    bound = 1.0
    for link in links:
        bound = math.nextafter(bound * link.norm, math.inf) if link.norm != 1.0 else bound
    return bound
