"""Pickles and copies of torch modules with a constraint: torch makes a class for each, without an import path."""

from copy import deepcopy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from orthogonium.layers._compiled_linear import multiply_without_copy
from orthogonium.layers._direct_reading import read_directly
from orthogonium.layers._flat_weights import read_weights_at_each_call
from orthogonium.layers._side_checks import check_sides_in_calls

_NOT_SAVED = {"_flat_weight_refs"}  # weak references


def make_picklable(module: nn.Module) -> None:
    """Let ``module``, just constrained, be pickled as its own class and state, unless its class knows how already.

    Tensors and modules that are shared stay shared, since pickle sees them.
    """
    parametrized = type(module)
    if parametrized.__reduce_ex__ is object.__reduce_ex__:
        parametrized.__reduce_ex__ = _reduced  # type: ignore[method-assign, assignment]


def adapt_class(module: nn.Module) -> None:
    """What the class that torch made for ``module`` has to do differently from its own."""
    if not hasattr(type(module).__bases__[0], "__deepcopy__"):
        type(module).__deepcopy__ = _deep_copied  # type: ignore[attr-defined]
    if not hasattr(type(module).__bases__[0], "__copy__"):
        type(module).__copy__ = _copied  # type: ignore[attr-defined]
    read_directly(module)
    multiply_without_copy(module)
    check_sides_in_calls(module)
    if isinstance(module, nn.RNNBase):
        read_weights_at_each_call(module)


def _reduced(module: nn.Module, protocol: Any) -> Any:
    state = {name: value for name, value in vars(module).items() if name not in _NOT_SAVED}
    return _empty, (type(module).__bases__[0],), state, None, None, _restore


def _empty(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)
    _give_class(module)


def _copied(module: nn.Module) -> nn.Module:
    """A shallow copy: as of any module of torch it shares parameters, buffers and children."""
    copied = _empty(type(module).__bases__[0])
    vars(copied).update(vars(module))
    _give_class(copied)
    return copied


def _deep_copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with a class of its own: in torch's copies it is shared, and removal from one takes it from all."""
    if id(module) not in memo:
        copied = _empty(type(module).__bases__[0])
        memo[id(module)] = copied
        vars(copied).update(deepcopy(vars(module), memo))
        _give_class(copied)
    found: nn.Module = memo[id(module)]
    return found


def _give_class(module: nn.Module) -> None:
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
    make_picklable(module)
    adapt_class(module)
