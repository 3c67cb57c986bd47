"""The weights of a model that can be made orthogonal, where they are, and why the others are left alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from orthogonium._selection import Choice
from orthogonium.parametrizations import Constraint, KernelPlan
from orthogonium.parametrizations.torch_weights import (
    WITH_LINEAR_MAPS,
    check_kernel,
    kernel_plan,
    stacked_blocks,
    weight_names,
)
from orthogonium.surgery.bounds import evaluating

ConvRule = Literal["kernel", "delta", "reshape"]
CONV_RULES = ("kernel", "delta", "reshape")


@dataclass
class ProjectableWeight:
    """One weight: ``module.name``, and how its entries form matrices or a kernel.

    Attributes:
        path: the full name, ``"encoder.rnn.weight_hh_l0"``.
        aliases: other names of the same parameter.
        blocks: a matrix weight is so many matrices stacked along its first side.
        plan: of a convolution kernel, with ``conv="kernel"``.
        shape: of the parameter.
    """

    path: str
    module: nn.Module
    name: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "kernel", "delta"] = "matrix"
    blocks: int = 1
    plan: KernelPlan | None = None
    aliases: list[str] = field(default_factory=list)

    @property
    def parametrized(self) -> bool:
        return is_parametrized(self.module, self.name)

    def list_of_hooks(self) -> ParametrizationList:
        found = self.module.parametrizations[self.name]  # type: ignore[index]
        assert isinstance(found, ParametrizationList)
        return found

    def parameters(self) -> list[Tensor]:
        """What an optimiser sees: the weight, or the free tensors behind it."""
        if self.parametrized:
            return list(self.list_of_hooks().parameters(recurse=False))
        return [getattr(self.module, self.name)]

    def read(self) -> Tensor:
        """The weight; of a parametrized one, without moving the state of its hooks."""
        if not self.parametrized:
            value = getattr(self.module, self.name)
            assert isinstance(value, Tensor)
            return value.detach()
        with evaluating(self.list_of_hooks()):
            return getattr(self.module, self.name).detach()


def find_projectable(
    model: nn.Module, chosen: Choice, conv: ConvRule, frozen: bool
) -> tuple[list[ProjectableWeight], dict[str, str]]:
    """``(sites, left)``: every weight that is asked for once, and a reason for each one that is not taken.

    Raises:
        ValueError: a weight on the meta device or without a shape; ``conv`` unknown.
    """
    if conv not in CONV_RULES:
        raise ValueError(f"conv must be one of {', '.join(map(repr, CONV_RULES))}, got {conv!r}")
    sites: dict[int, ProjectableWeight] = {}
    left: dict[str, str] = {}
    refused: dict[int, str] = {}
    for path, module, name in _weights(model):
        if not chosen([path], module):
            continue
        tensor = _stored(module, name)
        key = id(tensor)
        if key in sites:
            reason = _reason_by_class(module, name)
            if reason is None:
                sites[key].aliases.append(path)
            else:
                left[sites.pop(key).path] = f"tied to {path}: {reason}"
                left[path] = reason
                refused[key] = path
            continue
        if key in refused:
            left[path] = f"tied to {refused[key]}"
            continue
        found = _site(path, module, name, tensor, conv, frozen)
        if isinstance(found, str):
            left[path] = found
            refused[key] = path
        else:
            sites[key] = found
    return list(sites.values()), left


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(path, module, name)`` of everything with two dimensions or more, parametrized ones by their own name."""
    inside = {id(part) for m in model.modules() if isinstance(m, ParametrizationList) for part in m.modules()}
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        names = [name for name, value in module._parameters.items() if value is not None]
        if is_parametrized(module):
            names += list(module.parametrizations)
        for name in names:
            path = f"{prefix}.{name}" if prefix else name
            value = module._parameters.get(name)
            if value is None or isinstance(value, UninitializedParameter) or value.ndim >= 2:
                yield path, module, name


def _stored(module: nn.Module, name: str) -> Tensor:
    """The parameter, or the first of the free tensors behind it."""
    if not is_parametrized(module, name):
        value = module._parameters[name]
        assert value is not None
        return value
    parts: Any = module.parametrizations[name]  # type: ignore[index]
    return next(chain(parts.parameters(recurse=False), parts.buffers(recurse=False)))


def _reason_by_class(module: nn.Module, name: str) -> str | None:
    """Why a class is left alone; ``None`` for those with a rule."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
    if not isinstance(module, WITH_LINEAR_MAPS):
        return f"no rule for {type(module).__name__}"
    if name in weight_names(module):
        return None
    if name.endswith(("_g", "_v", "_orig", "_u")):
        return "only a part of a weight, which a hook (weight norm, spectral norm, pruning) computes"
    return "no weight of a linear map"


def _site(
    path: str, module: nn.Module, name: str, tensor: Tensor, conv: ConvRule, frozen: bool
) -> ProjectableWeight | str:
    reason = _reason_by_class(module, name)
    if reason is not None:
        return reason
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{path} has no shape yet. Run one forward pass first, or exclude it.")
    if tensor.is_meta:
        raise ValueError(
            f"{path} is on the meta device and has no entries to project. Materialise the model first, for example "
            "with model.to_empty(device=...) and its weights, or exclude it."
        )
    if is_parametrized(module, name):
        parts: Any = module.parametrizations[name]  # type: ignore[index]
        if any(isinstance(hook, Constraint) for hook in parts):
            return "constrained already"
        if not frozen and not any(p.requires_grad for p in parts.parameters(recurse=False)):
            return "frozen"
        tensor = ProjectableWeight(path, module, name, ()).read()
    elif not frozen and not tensor.requires_grad:
        return "frozen"
    if not tensor.is_floating_point():
        return f"{tensor.dtype} is not real floating point"
    if type(tensor.data) is not Tensor:
        return f"a {type(tensor.data).__name__}: gather it first"
    if tensor.numel() == 0:
        return "empty"
    shape = tuple(tensor.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        return _conv_site(path, module, name, shape, conv)
    if len(shape) != 2:
        return f"no rule for a tensor of shape {shape}"
    return ProjectableWeight(path, module, name, shape, blocks=stacked_blocks(module, name, shape[0]))


def _conv_site(
    path: str, module: nn.modules.conv._ConvNd, name: str, shape: tuple[int, ...], conv: ConvRule
) -> ProjectableWeight | str:
    """Transposed convolutions store the kernel of their adjoint: the same rule serves both."""
    plan = kernel_plan(module)
    if shape != plan.weight_shape:
        return "no kernel of its convolution"
    if conv == "reshape":
        return ProjectableWeight(path, module, name, shape, blocks=module.groups)
    if conv == "delta":
        return ProjectableWeight(path, module, name, shape, kind="delta", blocks=module.groups)
    try:
        check_kernel(module)
    except ValueError as error:
        return str(error)
    if plan.only_shifts:
        return "one channel per group: only signed shifts are orthogonal"
    return ProjectableWeight(path, module, name, shape, kind="kernel", plan=plan)
