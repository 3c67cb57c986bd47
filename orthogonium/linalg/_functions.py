"""Calling an autograd function at the least price: no look at its signature, no more kept than will be asked for."""

from typing import Any

import torch
from torch.autograd import Function

from orthogonium.linalg._precision import differentiates_forward


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, all arguments given.

    For functions with ``setup_context`` torch binds default arguments through ``inspect.signature`` at each call, 40 µs
    that a 64 × 64 matrix cannot spare. Tracers and ``torch.func`` get the ordinary call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def needs_forward_rule() -> bool:
    """Whether to take the variant of a function that has a ``jvp``.

    ``torch.compile`` does not accept one, and without it there is less to save.
    """
    return not torch.compiler.is_compiling() and differentiates_forward()
