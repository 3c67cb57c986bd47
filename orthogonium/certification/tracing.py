"""What a model computes, as a graph of calls: library layers and torch modules stay whole, the rest is looked into."""

import itertools
import math
import operator
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from orthogonium.certification.rules.registry import plain_type, rule_for_module

_ADVICE = (
    "Give the module a rule with orthogonium.certification.lipschitz_rule, or write it without that; choices made from "
    "constants and from module attributes are fine"
)
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


class _Model(nn.Module):
    """Holds the model, so that the model itself is a module of the graph like any other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _InPlace:
    """Records ``x += y`` as what it is, a change in place."""

    def __iadd__(self, other: Any) -> Any:
        return self._changed(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._changed(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._changed(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed(operator.itruediv, other)

    def __imatmul__(self, other: Any) -> Any:
        return self._changed(operator.imatmul, other)

    def __ipow__(self, other: Any) -> Any:
        return self._changed(operator.ipow, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._changed(operator.ifloordiv, other)

    def __imod__(self, other: Any) -> Any:
        return self._changed(operator.imod, other)

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "real", "imag"):
            raise TypeError(f"it assigns to .{name} of a tensor, which is not followed. Compute a new tensor")
        super().__setattr__(name, value)

    def _changed(self, function: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Proxy(_InPlace, fx.Proxy):
    """Stands for a tensor that depends on the input."""


class _Attribute(_InPlace, fx.proxy.Attribute):
    """Such as ``x.data``, which shares the memory of ``x``."""


class _Tracer(fx.Tracer):
    """Constants are computed as they come, in the model's own precision; what meets the input is recorded."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=())
        self.constants: dict[str, Tensor] = {}  # as they were when they were used
        self.sources: dict[str, Tensor] = {}
        self.states: dict[nn.Module, dict[str, Any]] = {}
        self.scopes: list[str] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if rule_for_module(m) is not None:
            return True
        return plain_type(m).__module__.startswith(("torch.nn", "torch.ao")) and not isinstance(m, nn.Sequential)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            held = [name for name, tensor in self.sources.items() if tensor is a and _same(a, self.constants[name])]
            name = held[0] if held else f"constant_{len(self.constants)}"
            if not held:
                self.sources[name], self.constants[name] = a, a.detach().clone()
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, torch.ScriptObject):
            where = named(self.scopes[-1] if self.scopes else "")
            raise TypeError(
                f"{where} computes with a {type(a).__name__}, whose numbers cannot be read. Use torch.nn layers"
            )
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise TypeError("it computes under autocast, whose precision no bound speaks of. Leave autocast")
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        node.meta["scope"] = self.scopes[-1] if self.scopes else ""
        return node

    def check_state(self, module: nn.Module, path: str) -> None:
        """Refuse a module that computes with other weights or options than when it was first called."""
        state = _state(module)
        if module not in self.states:
            self.states[module] = {
                name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in state.items()
            }
        first = self.states[module]
        for name in {**first, **state}:
            if name not in first or name not in state or not _same(first[name], state[name]):
                raise TypeError(f"the model changes {name} of {named(path)} while it computes")
        if any(part.training for part in module.modules()):
            raise TypeError(f"the model puts {named(path)} into training mode while it computes")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        varies = False

        def look(proxy: Any) -> Any:
            nonlocal varies
            varies = varies or isinstance(proxy, fx.Proxy)
            return proxy

        fx.node.map_aggregate((args, kwargs), look)
        if not varies:
            return forward(*args, **kwargs)
        path = self.path_of_module(m).removeprefix("model").removeprefix(".")
        if self.is_leaf_module(m, path):
            replaced = [name for name in vars(m) if callable(getattr(type(m), name, None))]
            if m._forward_hooks or m._forward_pre_hooks or replaced or _global_hooks():
                raise TypeError(
                    f"{named(path)} ({plain_type(m).__name__}) has forward hooks, or a forward of its own, which can "
                    f"change its output. Remove them; in place of the old weight_norm and spectral_norm use those of "
                    f"torch.nn.utils.parametrizations"
                )
            self.check_state(m, path)
            proxy = self.create_proxy("call_module", path, args, kwargs)
            proxy.node.meta["module"] = m
            return proxy
        self.scopes.append(path)
        result = forward(*args, **kwargs)
        self.scopes.pop()
        return result


def _global_hooks() -> bool:
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _state(module: nn.Module) -> dict[str, Any]:
    """What it may compute with: its tensors, and its options as far as they are plain values."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        held = vars(part).items() if "parametrizations" not in path else ()
        for name, value in (*held, *part._parameters.items(), *part._buffers.items()):
            if isinstance(value, Tensor | int | float | str | tuple | list | None):
                found[f"{path}.{name}" if path else name] = value
    return found


def _same(one: Any, other: Any) -> bool:
    """The same numbers, NaN where NaN."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and repr(one) == repr(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.is_meta or bool(((one == other) | ((one != one) & (other != other))).all())


def named(path: str) -> str:
    return path or "the model itself"


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of ``model`` in evaluation mode, and the constants in it.

    Each node's ``meta`` holds the ``"scope"``, the path of the module that makes the call, and ``"module"`` for calls
    of modules.

    Raises:
        TypeError: the model branches on values or otherwise cannot be followed; the message names the line, and the
            module.
        ValueError: the model, or a part of it, is in training mode, or has no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    training = [path for path, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"{named(training[0])} is in training mode, where it may compute something else. Call model.eval()"
        )
    lazy = [name for name, value in model.named_parameters() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ValueError(f"{lazy[0]} is not initialised yet. Give the model one batch first")
    tracer = _Tracer()
    try:
        with torch.no_grad():
            graph = tracer.trace(_Model(model))
            _check_states(graph, tracer)
            first, tracer = tracer, _Tracer()
            tracer.states = first.states
            _check_equal(graph, first.constants, tracer.trace(_Model(model)), tracer.constants)
            _check_states(graph, tracer)
    except Exception as error:
        if isinstance(error, TypeError) and "has forward hooks" in str(error):
            raise
        where = _users_line(error)
        scope = named(tracer.scopes[-1]) if tracer.scopes else "the model"
        raise TypeError(f"{scope} cannot be followed{where}: {_reason(error)}. {_ADVICE}") from error
    return graph, first.constants


def _check_states(graph: fx.Graph, tracer: _Tracer) -> None:
    for node in graph.nodes:
        if node.op == "call_module":
            tracer.check_state(node.meta["module"], node.target)


def _check_equal(
    graph: fx.Graph, constants: dict[str, Tensor], again: fx.Graph, constants_again: dict[str, Tensor]
) -> None:
    """Refuse a model that computes something else the second time: it counts, or draws numbers."""
    for one, other in itertools.zip_longest(graph.nodes, again.nodes):
        same = one is not None and other is not None and one.target == other.target and repr(one) == repr(other)
        same = same and (one.op, repr(one.args), repr(one.kwargs)) == (other.op, repr(other.args), repr(other.kwargs))
        if same and one.op == "get_attr":
            same = _same(constants[one.target], constants_again[other.target])
        if not same:
            node = one or other
            raise TypeError(
                f"{named(node.meta['scope'])} computes something else the second time (at {node.name}), so one bound "
                f"cannot cover the next call"
            )


def _users_line(error: BaseException) -> str:
    """Where the model's own code was, as ``at file:line (text)``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE)) and "<" not in f.filename[:1]]
    return f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "control flow" in text or "iterated" in text or "iteration" in text:
        return (
            "what it computes depends on the values or sizes of its input (control flow), so one bound cannot cover it"
        )
    if "dynamo-optimized" in text:
        return "it is compiled; pass the model that torch.compile was given"
    if "not installed as a submodule" in text:
        return "it calls a module that is not registered as one of its own (a list in place of ModuleList?)"
    return text.rstrip(".")
