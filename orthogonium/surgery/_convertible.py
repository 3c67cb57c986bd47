"""The weights of a model that a conversion is about, and what can be done with each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._selection import Choice
from orthogonium.layers._targets import geometry_of
from orthogonium.layers.conv import _PaddedConv
from orthogonium.layers.conv_transposed import _PaddedConvTranspose
from orthogonium.parametrizations import Constraint
from orthogonium.parametrizations.torch_weights import (
    CONVOLUTIONS,
    WITH_LINEAR_MAPS,
    check_kernel,
    kernel_plan,
    stacked_blocks,
    weight_names,
)

# Modules that do with their weights what torch's do; a subclass with a forward of its own might not.
_FORWARDS = {
    cls.forward
    for cls in (
        nn.Linear,
        *CONVOLUTIONS,
        nn.RNN,
        nn.LSTM,
        nn.GRU,
        nn.RNNCell,
        nn.LSTMCell,
        nn.GRUCell,
        nn.MultiheadAttention,
        _PaddedConv,
        _PaddedConvTranspose,
    )
}


@dataclass
class ConvertibleWeight:
    """One weight: where it is, and whether it can be constrained.

    ``method`` is ``"orthogonal"``, ``"partial"`` (orthogonal on the inputs that it reads), ``"almost"`` or ``"left"``;
    ``detail`` says how or why. ``signature`` is equal for weights that one constraint can serve.
    """

    module: nn.Module
    weight_name: str
    paths: list[str]
    method: str
    detail: str
    signature: object = field(default=None, compare=False)

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.module._parameters.get(self.weight_name)


def named_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module once, with all its paths."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(path)
    return found


def find_convertible(model: nn.Module, chosen: Choice) -> list[ConvertibleWeight]:
    """Every weight of ``model`` that could be meant, tied ones included, in the order of its modules."""
    sites: list[ConvertibleWeight] = []
    inside_parametrizations = {
        inner
        for module in model.modules()
        if is_parametrized(module)
        for inner in module.parametrizations.modules()  # type: ignore[union-attr]
    }
    for module, paths in named_modules(model).items():
        if module in inside_parametrizations:
            continue
        for name in _candidates(module):
            full = [f"{path}.{name}" if path else name for path in paths]
            site = ConvertibleWeight(module, name, full, *_judge(module, name))
            if site.method != "left" and not chosen(full, module):
                site.method, site.detail = "left", "not selected by include and exclude"
            sites.append(site)
    _agree_on_tied(model, sites)
    return sites


def _candidates(module: nn.Module) -> list[str]:
    """Of modules without a rule everything that has two dimensions, so that the report can say so."""
    if isinstance(module, WITH_LINEAR_MAPS) or _is_quantised(module):
        return weight_names(module)
    return [name for name, value in module._parameters.items() if value is not None and _dimensions(value) > 1]


def _dimensions(parameter: nn.Parameter) -> int:
    return 2 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.ndim


def _is_quantised(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__.split(".") and callable(getattr(module, "weight", None))


def _judge(module: nn.Module, name: str) -> tuple[str, str, object]:
    """``(method, detail, signature)``."""
    if _is_quantised(module):
        return "left", "quantised: convert and train first, then quantise", None
    if is_parametrized(module, name):
        hooks = list(module.parametrizations[name])  # type: ignore[index]
        ours = any(isinstance(hook, Constraint) for hook in hooks)
        names = ", ".join(type(hook).__name__ for hook in hooks)
        return "left", "constrained already" if ours else f"parametrized already, by {names}", None
    weight = module._parameters.get(name)
    if weight is None:
        return "left", f"{name} is no parameter (computed by a hook of weight or spectral norm, or pruned?)", None
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "left", "lazy: has no shape before the first forward pass", None
    if not weight.is_floating_point():
        return "left", f"its numbers are {weight.dtype}", None
    if type(weight) is not nn.Parameter:
        return "left", f"a {type(weight).__name__}: convert before sharding or wrapping tensors", None
    if not isinstance(module, WITH_LINEAR_MAPS):
        table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        return "left", "a table of vectors, no map of an input" if table else "of a module that is not known here", None
    if type(module).forward not in _FORWARDS:
        return "left", f"{type(module).__name__} has a forward of its own", None
    if weight.numel() == 0:
        return "left", "empty", None
    if not weight.requires_grad:
        return "left", "frozen: requires_grad is False", None
    if isinstance(module, _ConvNd):
        return _judge_kernel(module)
    blocks = stacked_blocks(module, name, weight.shape[0])
    what = "head" if isinstance(module, nn.MultiheadAttention) else "gate"
    detail = f"{blocks} blocks, one per {what}" if blocks > 1 else ""
    return "orthogonal", detail, ("matrix", blocks)


def _judge_kernel(module: _ConvNd) -> tuple[str, str, object]:
    try:
        geometry = geometry_of(module)
    except ValueError as error:
        return "left", str(error), None
    plan = kernel_plan(module)
    if plan.only_shifts:
        return "almost", "one channel per group: orthogonal kernels would be shifts", (plan, geometry, "almost")
    try:
        check_kernel(module)
    except ValueError:
        if any(k > 1 and gcd(s, d) > 1 for k, s, d in zip(plan.kernel_size, plan.stride, module.dilation, strict=True)):
            return "almost", "stride and dilation share a factor: no orthogonal kernel", (plan, geometry, "almost")
        return "partial", "as an operator on the inputs that its stride does not skip", (plan, geometry, "partial")
    return "orthogonal", "as an operator", (plan, geometry, "orthogonal")


def _agree_on_tied(model: nn.Module, sites: list[ConvertibleWeight]) -> None:
    """Tied weights are constrained together or not at all; an embedding follows the matrix that it is tied to."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append((module, name, f"{path}.{name}" if path else name))
    by_owner = {(id(site.module), site.weight_name): site for site in sites}
    for tied in owners.values():
        if len(tied) < 2:
            continue
        group = [by_owner.get((id(module), name)) for module, name, _ in tied]
        tables = [isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _, _ in tied]
        active = [site for site in group if site is not None and site.method != "left"]
        if not active:
            continue
        first = active[0]
        for (_, _, path), site, table in zip(tied, group, tables, strict=True):
            fits = site is not None and (site.signature == first.signature or (table and first.method == "orthogonal"))
            excluded = site is not None and site.method == "left" and not table
            if fits and not excluded:
                continue
            reason = f"tied to {path}, which cannot take the same constraint"
            for other in active:
                other.method, other.detail = "left", reason
            break
        else:
            for site in group:
                assert site is not None
                site.method, site.detail = first.method, first.detail


def check_finite(sites: Sequence[ConvertibleWeight]) -> None:
    """Raise ``ValueError``, before anything is changed, for a weight that holds NaN or Inf."""
    for site in sites:
        weight = site.parameter
        if site.method != "left" and weight is not None and not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f"{site.path} holds NaN or Inf. Repair it, or leave it out with exclude={site.path!r}")
