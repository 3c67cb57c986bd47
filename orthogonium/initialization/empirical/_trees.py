"""Tensors inside whatever a module takes and returns."""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def is_signal(value: Any) -> bool:
    """Whether ``value`` is a tensor of real floating-point numbers that is not empty."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def signals(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists, dicts and named tuples, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if is_signal(leaf)]


def map_signals(function: Callable[[int, Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with its ``i``-th floating-point tensor replaced by ``function(i, tensor)``."""
    leaves, structure = tree_flatten(tree)
    number = 0
    for position, leaf in enumerate(leaves):
        if is_signal(leaf):
            leaves[position] = function(number, leaf)
            number += 1
    return tree_unflatten(leaves, structure)


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple is several arguments, a dict keyword arguments, anything else the only argument."""
    if isinstance(batch, tuple):
        return batch, {}
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def detached(tree: Any) -> Any:
    """``tree`` with its tensors cut from the graph; values that later in-place operations cannot change."""
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def rms(tensor: Tensor) -> float:
    """Root mean square of the entries, in float32 or better, without overflow where squares would."""
    values = tensor.detach()
    dtype = torch.float32 if values.dtype.itemsize < 4 else values.dtype
    size = float(torch.linalg.vector_norm(values, dtype=dtype)) / max(values.numel(), 1) ** 0.5
    if 0 < size < inf:
        return size
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not 0 < largest < inf:
        return largest
    return largest * float(torch.linalg.vector_norm(values / largest, dtype=dtype)) / values.numel() ** 0.5
