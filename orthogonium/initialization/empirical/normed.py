"""The wrapper that holds a module's scales, and how to put it around every layer of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from orthogonium.initialization.empirical._gates import gate
from orthogonium.initialization.empirical._trees import map_signals

Wrapped = TypeVar("Wrapped", bound=type[nn.Module])
Model = TypeVar("Model", bound=nn.Module)
_SCALES = ("activation_scale", "gradient_scale", "update_scale")


class Normed(nn.Module):
    """``module`` with one factor on its outputs, one on their gradients and one on the gradients of its weights.

    The factors are buffers: saved with the model, not trained, kept in float32 whatever the model's type. They start at
    one; :func:`empirical_init` measures them.

    - ``activation_scale`` multiplies the outputs.
    - ``gradient_scale`` multiplies what comes back, in place of the derivative's own ``activation_scale``.
    - ``update_scale`` multiplies the gradients of the module's parameters and nothing else.

    The first two have one entry per output, or one for all. Outputs that a module hands back to itself (the states of
    recurrent layers and cells) and attention weights are left alone. Attributes are looked up in ``module`` where the
    wrapper has none, so ``wrapper.weight`` and ``wrapper.in_features`` work.

    Args:
        module: any module; called with any arguments, returning tensors in any nesting of tuples, lists and dicts.
    """

    activation_scale: Tensor
    gradient_scale: Tensor
    update_scale: Tensor
    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {module!r}")
        if any(isinstance(part, Normed) for part in module.modules()):
            raise ValueError(f"{type(module).__name__} holds wrapped modules already: scales would be counted twice")
        self.module = module
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        for name in _SCALES:
            self.register_buffer(name, torch.ones((1,) if name != "update_scale" else (), device=device))
        self._observer: Callable[[Normed, tuple[Any, ...], dict[str, Any]], Any] | None = None
        # torch's fused transformer kernels read weights without calling modules, unless hooks are there
        self.register_forward_pre_hook(_stay_off_the_fast_path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._observer is not None:
            return self._observer(self, args, kwargs)
        update, one = self.update_scale, torch.ones_like(self.update_scale)

        def into(_: int, tensor: Tensor) -> Tensor:
            return gate(tensor, one, 1 / update) if tensor.requires_grad else tensor

        def out_of(number: int, tensor: Tensor) -> Tensor:
            if not is_scaled(self.module, number):
                return gate(tensor, one, update)
            last = len(self.activation_scale) - 1
            backward = self.gradient_scale[min(number, last)] * update
            return gate(tensor, self.activation_scale[min(number, last)], backward)

        args, kwargs = map_signals(into, (args, kwargs))
        return map_signals(out_of, self.module(*args, **kwargs))

    def set_scales(self, activation: list[float], gradient: list[float], update: float) -> None:
        """Replace all factors; the lists have one entry per output, or one for all."""
        device = self.update_scale.device
        for name, values in zip(_SCALES, (activation, gradient, update), strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=device))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if name.startswith("__") or "module" not in modules:
                raise
            return getattr(modules["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = (self.__dict__.get("_modules") or {}).get("module")
        if inner is not None and name not in _SCALES and _has_tensor(inner, name):
            setattr(inner, name, value)  # wrapper.weight = ... reaches the layer
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: getattr(self, name) for name in _SCALES}
        super()._apply(fn, *args, **kwargs)
        for name, scale in before.items():  # a factor of 1e6 is no number of float16
            after = getattr(self, name)
            if after.dtype != torch.float32 and not after.is_meta:
                self.register_buffer(name, scale.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in _SCALES[:2]:  # one entry per output: as many as were saved
            saved = state_dict.get(f"{prefix}{name}")
            if isinstance(saved, Tensor) and saved.ndim == 1 and len(saved):
                present = getattr(self, name)
                self.register_buffer(name, present.new_ones(len(saved)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _has_tensor(module: nn.Module, name: str) -> bool:
    return name in module._parameters or name in module._buffers or is_parametrized(module, name)


def _stay_off_the_fast_path(module: nn.Module, inputs: Any) -> None:
    return None


def is_scaled(module: nn.Module, number: int) -> bool:
    """Whether the ``number``-th output is signal for others, not state for the module itself."""
    if isinstance(module, nn.RNNCellBase):
        return False
    return number == 0 or not isinstance(module, nn.RNNBase | nn.MultiheadAttention)


def get_wrapped_submodules(module: nn.Module) -> list[Normed]:
    """Every :class:`Normed` in ``module``, itself included, once each."""
    return [found for found in module.modules() if isinstance(found, Normed)]


@contextmanager
def true_gradients(model: nn.Module) -> Iterator[None]:
    """Within it, derivatives of ``model`` are those of what it computes, with no scales of their own."""
    wrappers = get_wrapped_submodules(model)
    before = [(wrapper.gradient_scale, wrapper.update_scale) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.gradient_scale = wrapper.activation_scale
            wrapper.update_scale = torch.ones_like(wrapper.update_scale)
        yield
    finally:
        for wrapper, (gradient, update) in zip(wrappers, before, strict=True):
            wrapper.gradient_scale, wrapper.update_scale = gradient, update


@overload
def wrap_all_leaf_modules(target: Wrapped) -> Wrapped: ...
@overload
def wrap_all_leaf_modules(target: Model) -> Model: ...
@overload
def wrap_all_leaf_modules(target: Callable[..., None]) -> Callable[..., None]: ...
def wrap_all_leaf_modules(target: Any) -> Any:
    """Put :class:`Normed` around every layer that has parameters of its own.

    As a decorator of ``__init__`` or of a whole class, this happens when ``__init__`` is through; called on a model, at
    once. A layer is a module with parameters and without parts that have some; ``nn.MultiheadAttention``, which reads
    the weights of its parts without calling them, and parametrized layers count as one. What is wrapped stays as it is,
    and a layer that is registered in several places gets one wrapper for all.

    Args:
        target: an ``__init__``, a subclass of ``nn.Module``, or a model.

    Returns:
        ``target``, decorated; for a model, the same model (a wrapper around it if it is itself one layer).

    Raises:
        TypeError: ``target`` is none of these.
    """
    if isinstance(target, nn.Module):
        if is_leaf(target):
            return Normed(target)
        _wrap_children(target)
        return target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"a decorated class must be a subclass of torch.nn.Module, got {target.__name__}")
        target.__init__ = wrap_all_leaf_modules(target.__init__)  # type: ignore[method-assign]
        return target
    if not callable(target):
        raise TypeError(f"target must be an __init__, a subclass of nn.Module or a model, got {target!r}")

    @functools.wraps(target)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        target(self, *args, **kwargs)
        _wrap_children(self)

    return init


def is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is one layer: it has parameters, and no parts that have some."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, Normed) or next(module.parameters(), None) is None:
        return False
    parts = [child for name, child in module.named_children() if name != "parametrizations"]
    return all(next(part.parameters(), None) is None for part in parts)


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer of ``model`` once, with its name; nothing inside another layer."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in inside and is_leaf(module):
            inside |= {id(part) for part in module.modules()}
            yield name, module


def _wrap_children(model: nn.Module) -> None:
    wrappers: dict[int, Normed] = {id(wrapper.module): wrapper for wrapper in get_wrapped_submodules(model)}
    inside = {id(part) for wrapper in wrappers.values() for part in wrapper.modules()}
    for parent in list(model.modules()):
        if id(parent) in inside or isinstance(parent, ParametrizationList):
            continue
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # its layers take the ordinary way now, which knows no nested tensors
        for name, child in list(parent._modules.items()):
            if child is not None and name != "parametrizations" and is_leaf(child):
                if id(child) not in wrappers:
                    wrappers[id(child)] = Normed(child)
                    inside |= {id(part) for part in child.modules()}
                parent._modules[name] = wrappers[id(child)]
