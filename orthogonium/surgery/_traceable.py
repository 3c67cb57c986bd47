"""Layers that torch has no module for, written in torch operations alone so that ``torch.fx`` can record them.

Nothing here is handed out: :func:`recorded` turns an instance into a ``GraphModule``, whose class and code are torch's.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from orthogonium.layers.conv import _CONVOLUTIONS
from orthogonium.layers.conv_transposed import _TRANSPOSED, _PaddedConvTranspose
from orthogonium.layers.skew_conv import _SkewOrthoConv


def recorded(module: nn.Module, name: str) -> fx.GraphModule:
    """The operations of ``module`` as a graph of torch operations; modules inside it that are torch's stay modules."""
    graph = fx.Tracer().trace(module)
    found = fx.GraphModule(module, graph, class_name=name)
    found.meta.clear()  # names source files of this library
    for node in graph.nodes:
        node.meta.clear()
        node.stack_trace = None
    return found


class SortedGroups(nn.Module):
    """:class:`orthogonium.layers.GroupSort` without its checks."""

    def __init__(self, group_size: int, dim: int) -> None:
        super().__init__()
        self.group_size, self.dim = group_size, dim

    def forward(self, features: Tensor) -> Tensor:
        groups = features.unflatten(self.dim, (-1, self.group_size))
        axis = self.dim + 1 if self.dim >= 0 else self.dim
        if self.group_size == 2:
            first, second = torch.chunk(groups, 2, axis)
            ordered = torch.cat((torch.maximum(first, second), torch.minimum(first, second)), axis)
        else:
            ordered = torch.sort(groups, dim=axis, descending=True)[0]
        return ordered.flatten(axis - 1, axis)


class FoldedTranspose(nn.Module):
    """A transposed convolution whose border is cut off, or added where it came from, as circular padding asks."""

    def __init__(self, layer: _PaddedConvTranspose, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.dims, self.circular, self.pads = layer._dims, layer.geometry.circular, layer.geometry.pads
        added = [more + filled for more, filled in zip(layer.output_padding, layer._filled, strict=True)]
        self.arguments: tuple[Any, ...] = (tuple(layer.stride), 0, tuple(added), layer.groups, tuple(layer.dilation))

    def forward(self, features: Tensor) -> Tensor:
        wide = _TRANSPOSED[self.dims](features, self.weight, None, *self.arguments)
        for axis, (before, after) in enumerate(self.pads):
            wide = self.fold(wide, axis - self.dims, before, after)
        return wide if self.bias is None else wide + self.bias.view(-1, *(1,) * self.dims)

    def fold(self, wide: Tensor, dim: int, before: int, after: int) -> Tensor:
        side = wide.shape[dim] - before - after
        core = wide.narrow(dim, before, side)
        if not self.circular:
            return core
        behind = [0, 0] * (-dim - 1)
        if before:
            core = core + F.pad(wide.narrow(dim, 0, before), [*behind, side - before, 0])
        if after:
            core = core + F.pad(wide.narrow(dim, before + side, after), [*behind, 0, side - after])
        return core


class SkewSeries(nn.Module):
    """:class:`orthogonium.layers.SkewOrthoConv2d` and its kin with the terms of the series written out."""

    def __init__(self, layer: _SkewOrthoConv, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.layer = (layer.in_channels, layer.out_channels, layer.groups)
        self.dims, self.dilation, self.terms = layer._dims, layer.dilation, layer._terms(weight.dtype)
        self.around = [p for pair in reversed(layer.geometry.pads) for p in pair]
        self.circular = layer.geometry.circular

    def forward(self, features: Tensor) -> Tensor:
        inner, outer, groups = self.layer
        axis = -self.dims - 1
        if inner < outer:
            grouped = features.unflatten(axis, (groups, -1))
            features = F.pad(grouped, [0, 0] * self.dims + [0, (outer - inner) // groups]).flatten(axis - 1, axis)
        term, total = features, features
        for order in range(1, self.terms + 1):
            term = self.skew(term) / order
            total = total + term
        if outer < inner:
            total = total.unflatten(axis, (groups, -1)).narrow(axis, 0, outer // groups).flatten(axis - 1, axis)
        return total if self.bias is None else total + self.bias.view(-1, *(1,) * self.dims)

    def skew(self, features: Tensor) -> Tensor:
        around = self.around
        if self.circular and any(around):
            features, around = F.pad(features, around, mode="circular"), [0] * len(around)
        padding = tuple(reversed(around[::2]))
        more = (1, padding, self.dilation, self.layer[2])
        return _CONVOLUTIONS[self.dims](features, self.weight, None, *more)
