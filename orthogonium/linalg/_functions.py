"""Calling an autograd function without the price of looking at its signature."""

from typing import Any

import torch
from torch.autograd import Function


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, all arguments given.

    For functions with ``setup_context`` torch binds default arguments through ``inspect.signature`` at each call, 40 µs
    that a 64 × 64 matrix cannot spare. Tracers and ``torch.func`` get the ordinary call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]
