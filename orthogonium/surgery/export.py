"""A plain copy of a constrained model: torch's modules only, the same outputs, this library not needed."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from orthogonium.surgery.bounds import evaluating
from orthogonium.surgery.folding import Uses, fold
from orthogonium.surgery.plain import RULES, in_torch_operations

_TENSORS_AND_CHILDREN = {"_parameters", "_buffers", "_modules"}


def export(model: nn.Module) -> nn.Module:
    """A new model of ordinary torch modules that computes what ``model`` computes in evaluation mode.

    Weights are baked in: a constrained layer becomes the torch layer with the weight that it had, bit for bit. Layers
    that torch has no class for (``MaxMin``, circular transposed convolutions, …) become ``torch.fx.GraphModule`` s of
    torch operations. Modules of your own keep their class. The copy shares no memory with ``model``; tied weights are
    tied in it too. A centring that follows a convolution in an ``nn.Sequential`` (or a linear layer, after a
    ``Flatten``) is folded into it, where the outputs agree to rounding. The copy is in evaluation mode, and checks no
    image sides any more.

    It loads where this library is not installed: with ``torch.save`` of the whole copy, as a program by
    ``torch.export.save``, as ONNX, or its state dict into the same torch layers.

    Args:
        model: any module, constrained or not, in any mode; unchanged.

    Returns:
        The copy.

    Raises:
        TypeError: ``model`` is no module, or a module of this library cannot be written in torch operations; the
            message names its path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with evaluating(model), torch.no_grad():
        plain = Exporter(Uses(model)).module(model, "")
    return plain.eval()


class Exporter:
    """One export: what has been copied so far, so that what was shared stays shared."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._memo: dict[int, Any] = {}  # by id, as copy.deepcopy keeps it
        self._keep: list[Any] = []  # while ids are in use

    def module(self, old: nn.Module, path: str) -> nn.Module:
        """The plain counterpart of ``old``, made once."""
        if id(old) not in self._memo:
            self._remember(old, self._made(old, path))
        found: nn.Module = self._memo[id(old)]
        return found

    def _made(self, old: nn.Module, path: str) -> nn.Module:
        cls = type_before_parametrizations(old)
        for base, rule in RULES.items():
            if issubclass(cls, base) and _is_ours(cls):
                return rule(old, self.tensor)
        copied = self._copied(old, cls, path)
        if not _is_ours(cls):
            return copied
        try:
            return in_torch_operations(copied.eval())
        except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError) as error:
            raise TypeError(
                f"{path or 'the model itself'} is a {cls.__name__}, for which there is no form in torch operations: "
                f"{error}"
            ) from error

    def tensor(self, old: nn.Module, name: str) -> Any:
        """A copy of a parameter or buffer, constrained or not; the same one for a tied tensor; ``None`` for none."""
        if is_parametrized(old, name):
            source: Any = old.parametrizations[name]  # type: ignore[index]
            value = source()  # not by attribute: inside parametrize.cached() a copy would read its original's
            trains = any(p.requires_grad for p in source.parameters(recurse=False))
        else:
            source = value = old._parameters[name] if name in old._parameters else old._buffers[name]
            trains = value is not None and value.requires_grad
        if source is None:
            return None
        if id(source) not in self._memo:
            still = value.detach().clone()  # with the strides, on which the choice of kernels may depend
            is_parameter = is_parametrized(old, name) or isinstance(source, nn.Parameter)
            self._remember(source, nn.Parameter(still, trains) if is_parameter else still)
        return self._memo[id(source)]

    def _remember(self, old: Any, new: Any) -> None:
        self._memo[id(old)] = new
        self._keep.append(old)

    def _copied(self, old: nn.Module, cls: type[nn.Module], path: str) -> nn.Module:
        """The same class and attributes, with every tensor copied and every child made plain."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        self._remember(old, new)  # before the attributes, which may refer to it
        constrained = list(old.parametrizations) if is_parametrized(old) else []  # type: ignore[arg-type]
        for name in [*constrained, *(name for name in old._parameters if name not in constrained)]:
            new.register_parameter(name, self.tensor(old, name))
        for name in old._buffers:
            new.register_buffer(name, self.tensor(old, name), name not in old._non_persistent_buffers_set)
        for name, child in old._modules.items():
            if name == "parametrizations" and constrained:
                continue
            whole = f"{path}.{name}" if path else name
            new._modules[name] = None if child is None else self.module(child, whole)
        for name, value in vars(old).items():
            if name in _TENSORS_AND_CHILDREN or (name.startswith("_flat_weight") and name != "_flat_weights_names"):
                continue
            vars(new)[name] = copy.deepcopy(_without_our_hooks(name, value), self._memo)
        if isinstance(new, nn.RNNBase):
            new._init_flat_weights()
        if type(old) is nn.Sequential and isinstance(new, nn.Sequential):
            fold(old, new, self._uses)
        return new


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _without_our_hooks(name: str, value: Any) -> Any:
    """Hooks of this library, which translate checkpoints, stay behind."""
    if not name.endswith("_hooks") or not isinstance(value, dict):
        return value
    return OrderedDict((k, h) for k, h in value.items() if not _is_ours(type(getattr(h, "hook", h))))
