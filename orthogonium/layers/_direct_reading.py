"""Reading a constrained weight without two module calls on the way, which cost as much as a small layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from orthogonium.parametrizations import Constraint

_CALL = nn.Module.__call__  # tracers put another one in its place while they are at work


class _DirectReading(property):
    """The property that ``torch.nn.utils.parametrize`` gave a class, with a short way for its getter."""


def read_directly(module: nn.Module) -> None:
    """Give the constrained tensors of ``module``, whose class torch has made for it, a short way to their values.

    It ends at the constraint, as torch's does, and is taken when nobody could tell the difference: nothing else is
    registered on the tensor, no hook waits for a module call, and nobody traces, compiles or caches.
    """
    cls = type(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        given = vars(cls)[name]
        if not isinstance(given, _DirectReading):
            setattr(cls, name, _directly(name, given))


def lone_constraint(module: Any, name: str) -> tuple[Constraint, list[Tensor]] | None:
    """The constraint on ``module.name`` and its free tensors, if nothing else stands behind it and no hook waits."""
    listing = module._modules["parametrizations"]._modules[name]
    hooks, free = listing._modules, listing._parameters
    constraint = hooks.get("0")
    if type(constraint) is not Constraint or len(hooks) > 1 or len(free) != listing.ntensors:
        return None
    return None if _is_watched(listing) or _is_watched(constraint) else (constraint, list(free.values()))


def _directly(name: str, given: Any) -> _DirectReading:
    def read(module: Any) -> Tensor:
        if not (torch.compiler.is_compiling() or parametrize._cache_enabled or _calls_are_watched()):
            found = lone_constraint(module, name)
            if found is not None:
                return found[0].forward(*found[1])
        return given.fget(module)

    return _DirectReading(read, given.fset, given.fdel)


def _calls_are_watched() -> bool:
    """Whether somebody counts on every call of a module."""
    return nn.Module.__call__ is not _CALL or _has_any_global_hook() or torch._C._get_tracing_state() is not None


def _is_watched(module: Any) -> bool:
    """Whether somebody counts on the calls of this one."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
