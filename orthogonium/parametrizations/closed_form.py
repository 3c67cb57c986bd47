"""Which hooks know the reverse of what they compute, so that autograd need not record it."""

from functools import cache
from typing import Any

from torch import nn

from orthogonium.parametrizations._evaluation import ComputeWithReverse


def closed_form(hook: nn.Module) -> ComputeWithReverse | None:
    """``hook``, from free tensors to ``[weight]``, with a reverse that needs no autograd; ``None`` where there is none.

    Hooks opt in by a method ``closed_form``. Those that somebody listens to must be called.
    """
    own: Any = getattr(hook, "closed_form", None)
    if own is None or hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks:
        return None
    found: ComputeWithReverse | None = own()
    return found


@cache
def overrides(kind: Any, names: tuple[str, ...], known: str) -> bool:
    """Whether a class changes one of ``names`` and inherits ``known``, which speaks of what it was before."""
    owner = next(base for base in kind.__mro__ if known in base.__dict__)
    below = kind.__mro__[: kind.__mro__.index(owner)]
    return any(name in base.__dict__ for base in below for name in names)
