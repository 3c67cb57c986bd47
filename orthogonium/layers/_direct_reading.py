"""Reading a constrained weight without two module calls on the way, which cost as much as a small layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from orthogonium.parametrizations import Constraint

_CALL = nn.Module.__call__  # tracers put another one in its place while they are at work
_HOOKS_ON_ALL = tuple(  # filled and emptied in place
    hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and isinstance(hooks, dict)
)


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
    if not isinstance(constraint, Constraint) or len(hooks) > 1 or len(free) != listing.ntensors:
        return None
    return None if _is_watched(listing) or _is_watched(constraint) else (constraint, list(free.values()))


def _is_watched(module: Any) -> bool:
    """Whether somebody counts on the calls of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _directly(name: str, given: Any) -> _DirectReading:
    """Few calls and few objects: between two products of matrices, each comes from memory and not from a cache."""

    def read(module: Any) -> Tensor:
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if not (traced or parametrize._cache_enabled or nn.Module.__call__ is not _CALL or any(_HOOKS_ON_ALL)):
            found = lone_constraint(module, name)
            if found is not None:
                constraint, originals = found
                value = None if torch.is_grad_enabled() else constraint.remembered_value(originals)
                return constraint.forward(*originals) if value is None else value
        return given.fget(module)

    return _DirectReading(read, given.fset, given.fdel)
