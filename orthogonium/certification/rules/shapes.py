"""Rules for what moves entries without computing: reshaping, slicing, joining."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.certification.rounding import sqrt_up
from orthogonium.certification.rules.registry import (
    EXACT,
    Refused,
    Response,
    Unknown,
    Variable,
    filled,
    lipschitz_rule,
)

_SAME = Response(1.0, EXACT)
_PAIRS = ("sort", "max", "min", "topk")


@lipschitz_rule(nn.Flatten)
def _flatten_layer(module: nn.Flatten, x: Variable) -> Response:
    return _flatten(x, module.start_dim, module.end_dim)


@lipschitz_rule(torch.flatten, "flatten")
def _flatten(x: Variable, start_dim: int = 0, end_dim: int = -1) -> Response:
    rank = None if x.shape is None else len(x.shape)
    if start_dim == 0 or (rank is not None and start_dim % rank == 0):
        raise Refused(f"has start_dim={start_dim}, which merges the batch. Use start_dim=1")
    return _SAME


@lipschitz_rule(nn.Unflatten)
def _unflatten_layer(module: nn.Unflatten, x: Variable) -> Response:
    return _unflatten(x, module.dim, module.unflattened_size)


@lipschitz_rule(torch.unflatten, "unflatten")
def _unflatten(x: Variable, dim: Any, sizes: Any) -> Response:
    if not isinstance(dim, int):
        raise Refused("names its dimension. Use a number")
    x.axis(dim)
    return _SAME


@lipschitz_rule(
    *(torch.reshape, "reshape", "view", "reshape_as", "view_as", "contiguous", "clone", torch.clone, "detach"),
    *(torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.movedim, "movedim"),
    *(torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"),
)
def _reshape(x: Variable, *args: Any, **kwargs: Any) -> Response:
    """The tracing sees to it that the batch stays in front."""
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        raise Refused("reinterprets bits as another type")
    return _SAME


@lipschitz_rule(torch.flip, "flip", fresh=True)
def _flip(x: Variable, *dims: Any, **named: Any) -> Response:
    for dim in named.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims):
        x.axis(dim)
    return _SAME


@lipschitz_rule(torch.roll, "roll", fresh=True)
def _roll(x: Variable, shifts: Any, dims: Any = ()) -> Response:
    if dims is None or dims == () or dims == []:
        raise Refused("moves entries along all axes, the batch among them. Say which with dims")
    for dim in [dims] if isinstance(dims, int) else dims:
        x.axis(dim)
    return _SAME


@lipschitz_rule(nn.PixelShuffle, nn.PixelUnshuffle, fresh=True)
def _pixels(module: nn.Module, x: Variable) -> Response:
    return _SAME


@lipschitz_rule(nn.ChannelShuffle, nn.functional.channel_shuffle, torch.channel_shuffle, fresh=True)
@lipschitz_rule(nn.functional.pixel_shuffle, nn.functional.pixel_unshuffle, torch.pixel_shuffle, fresh=True)
def _shuffle(*args: Any, **kwargs: Any) -> Response:
    return _SAME


@lipschitz_rule("expand", "expand_as", "repeat", torch.tile, "tile")
def _expand(x: Variable, *args: Any, **kwargs: Any) -> Response:
    raise Refused("repeats entries, by a factor that is not known here. Use broadcasting or torch.cat")


@lipschitz_rule(torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split", torch.unbind, "unbind")
def _parts(x: Variable, *args: Any, **kwargs: Any) -> Response:
    return _SAME


@lipschitz_rule(torch.narrow, "narrow", torch.select, "select")
def _slice(x: Variable, dim: int, *args: Any, **kwargs: Any) -> Response:
    x.axis(dim)
    return _SAME


@lipschitz_rule(operator.getitem)
def _getitem(x: Any, index: Any) -> Response:
    if isinstance(x, Variable) and x.origin in _PAIRS and index not in (0, -2):
        raise Refused(f"takes the indices of {x.origin}, which jump. Take the values")
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, bool) or not (part is None or part is Ellipsis or isinstance(part, int | slice | Unknown)):
            raise Refused("indexes by a tensor or a list, which may repeat entries. Use slices, or torch.cat of slices")
    return _SAME


@lipschitz_rule(getattr)
def _attribute(x: Variable, name: str) -> Response:
    if name == "values" and x.origin in _PAIRS:
        return _SAME
    if name in ("mT", "data", "real"):
        return _SAME
    raise Refused(f"reads the attribute {name!r}, whose dependence on the input is not known")


def _check_list(tensors: Any) -> None:
    if isinstance(tensors, Variable):
        raise Refused("joins the parts of a split without taking them apart. Use a, b = x.split(…) and [a, b]")


@lipschitz_rule(torch.cat, torch.concat, torch.concatenate, fresh=True)
def _cat(tensors: Any, dim: int = 0, **kwargs: Any) -> Response:
    dim = kwargs.get("axis", dim)
    _check_list(tensors)
    parts = [t for t in tensors if isinstance(t, Variable)]
    parts[0].axis(dim)
    return Response((1.0,) * len(parts), EXACT, stacked=True)


@lipschitz_rule(torch.stack, fresh=True)
def _stack(tensors: Any, dim: int = 0) -> Response:
    _check_list(tensors)
    parts = [t for t in tensors if isinstance(t, Variable)]
    if dim == 0 or (parts[0].shape is not None and dim == -len(parts[0].shape) - 1):
        raise Refused("has dim=0, before the batch. Use another dim")
    return Response((1.0,) * len(parts), EXACT, stacked=True)


@lipschitz_rule("to", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda")
def _cast(x: Variable, *args: Any, **kwargs: Any) -> Response:
    """No rounding is known after a change of type; whole numbers jump."""
    given = (*args, *kwargs.values())
    types = [a.dtype if isinstance(a, Tensor) else a for a in given if isinstance(a, Tensor | torch.dtype)]
    if any(not t.is_floating_point for t in types):
        raise Refused(f"turns its input into {types[0]}, which jumps or is not real")
    moves = bool(args) and not types and all(isinstance(a, str | torch.device | bool) for a in given)
    return _SAME if moves else Response(1.0)


@lipschitz_rule(torch.zeros_like, torch.ones_like, "new_zeros", "new_ones", fresh=True)
def _constant(x: Variable, *args: Any, **kwargs: Any) -> Response:
    return Response(0.0, EXACT)


@lipschitz_rule(torch.full_like, fresh=True)
def _full(x: Variable, fill_value: Any, **kwargs: Any) -> Response:
    return Response(0.0, filled(fill_value))


@lipschitz_rule("new_full", fresh=True)
def _new_full(x: Variable, size: Any, fill_value: Any, **kwargs: Any) -> Response:
    return Response(0.0, filled(fill_value))


@lipschitz_rule(nn.Unfold)
def _unfold_layer(module: nn.Unfold, x: Variable) -> Response:
    return _unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)


@lipschitz_rule(nn.functional.unfold, fresh=True)
def _unfold(x: Variable, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Response:
    """Each entry is copied into every window that reads it."""
    total = 1
    for axis in range(2):
        k, d, s = (v if isinstance(v, int) else v[axis] for v in (kernel_size, dilation, stride))
        total *= math.ceil(k * math.gcd(s, d) / s)
    return Response(sqrt_up(total), EXACT)
