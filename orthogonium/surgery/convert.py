"""Constrain every weight of an ordinary model, in place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from orthogonium._selection import Choice, Selection, choice, included, reusable
from orthogonium.layers.constrain import almost_orthogonal, constrain_kernel, orthogonal, share_constraint
from orthogonium.linalg import qr_orthogonalize
from orthogonium.parametrizations import draw_parts
from orthogonium.parametrizations.torch_weights import kernel_plan, stacked_blocks
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams
from orthogonium.surgery._convertible import ConvertibleWeight, check_finite, find_convertible, named_modules
from orthogonium.surgery.bounds import network_bound
from orthogonium.surgery.report import Change, ConversionReport

Swaps = Mapping[type[nn.Module], Callable[[Any], nn.Module | None]]


def convert(
    model: nn.Module,
    ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    init: str = "project",
    swaps: Swaps | None = None,
    input_shape: Sequence[int] | None = None,
) -> ConversionReport:
    """Put the orthogonality constraint on every weight of ``model`` that can carry it, in place.

    ``nn.Linear``, convolutions and transposed convolutions (as operators), recurrent modules and cells (gate by gate),
    and the projections of ``nn.MultiheadAttention`` (head by head). Kernels of which no orthogonal one exists are
    bounded by one otherwise, and the report says so. Tied weights stay tied. Weights that are frozen, constrained
    already, lazy, quantised or of unknown modules are left, with the reason. On the meta device the constraints are
    laid out, and a checkpoint of the unconstrained model can be loaded into them.

    A weight with one free tensor keeps its :class:`Parameter` object; kernels wider than their stride get two new ones.
    So convert first, then build the optimiser.

    Args:
        model: any module.
        ortho_params: how free matrices become orthogonal.
        include, exclude: as in :func:`orthogonium.orthogonalize_model`; for ``swaps``, names are those of modules.
        init: ``"project"`` starts from an orthogonal weight near the present one, ``"reset"`` from one drawn uniformly.
        swaps: by exact class, what makes another module from one of that class, or ``None`` to leave it; for example
            ``{nn.ReLU: lambda old: og.MaxMin()}`` or :data:`orthogonium.surgery.LIPSCHITZ_SWAPS`. Children come before
            parents, so what makes a new block finds the old one's parts swapped already.
        input_shape: of one input, where bounds depend on it.

    Returns:
        A :class:`ConversionReport`, which prints as a table.

    Raises:
        ValueError: another ``init``, an ``include`` that matches nothing, or a weight that holds NaN or Inf; nothing
            has been changed then.
        TypeError: ``model`` is no module, ``ortho_params`` no :class:`OrthoParams`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(ortho_params, OrthoParams):
        raise TypeError(f"ortho_params must be an OrthoParams such as CHOLESKY_ORTHO_PARAMS, got {ortho_params!r}")
    if init not in ("project", "reset"):
        raise ValueError(f"init must be 'project' or 'reset', got {init!r}")
    include, exclude = reusable(include), reusable(exclude)
    chosen, swapped = included(include, exclude, by_owner=True), included(include, exclude)
    sites = find_convertible(model, chosen)
    _check_matches(model, include, sites)
    check_finite(sites)
    before, _ = network_bound(model, input_shape)
    rows = _swap(model, swaps or {}, swapped)
    done: dict[int, ConvertibleWeight] = {}
    for site in find_convertible(model, chosen):
        rows.append(_constrain(site, ortho_params, init, done))
    after, unknown = network_bound(model, input_shape)
    return ConversionReport(tuple(rows), before, after, unknown)


def _check_matches(model: nn.Module, include: Selection | None, sites: Sequence[ConvertibleWeight]) -> None:
    weights, modules = choice("include", include, True, by_owner=True), choice("include", include, True)
    found = any(weights(site.paths, site.module) for site in sites)
    if include is not None and not found and not any(modules(p, m) for m, p in named_modules(model).items()):
        raise ValueError(f"include={include!r} matches no weight of {type(model).__name__}")


def _constrain(
    site: ConvertibleWeight, ortho_params: OrthoParams, init: str, done: dict[int, ConvertibleWeight]
) -> Change:
    module, name, weight = site.module, site.weight_name, site.parameter
    kind = type(module).__name__.removeprefix("Parametrized")
    if site.method == "left":
        shape = () if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else tuple(weight.shape)
        return Change(site.path, kind, shape, "left", site.detail)
    assert weight is not None
    shape, source = tuple(weight.shape), done.get(id(weight))
    if source is not None:
        share_constraint(module, name, source.module, source.weight_name)
        return Change(site.path, kind, shape, "tied", f"to {source.path}")
    before = None if weight.is_meta else weight.detach().clone()
    done[id(weight)] = site
    if init == "reset" and not weight.is_meta:
        _draw(site, weight)
    if site.method == "almost":
        assert isinstance(module, _ConvNd)
        almost_orthogonal(module)
    elif site.method == "partial":
        assert isinstance(module, _ConvNd)
        constrain_kernel(module, name, kernel_plan(module), ortho_params)
    else:
        orthogonal(module, name, ortho_params)
    action = "almost orthogonal" if site.method == "almost" else "orthogonal"
    return Change(site.path, kind, shape, action, site.detail, _distance(before, module, name))


def _distance(before: Tensor | None, module: nn.Module, name: str) -> float | None:
    if before is None:
        return None
    with torch.no_grad():
        moved = torch.linalg.vector_norm(getattr(module, name).double() - before.double())
        size = torch.linalg.vector_norm(before.double())
    return float(moved / size) if size > 0 else float("inf")


def _draw(site: ConvertibleWeight, weight: Tensor) -> None:
    """A uniformly distributed orthogonal weight in place of ``weight``."""
    with torch.no_grad():
        if isinstance(site.module, _ConvNd):
            if site.method != "almost":
                plan = kernel_plan(site.module)
                weight.copy_(plan.assemble(*draw_parts(plan, weight.device, weight.dtype)))
            return
        blocks = stacked_blocks(site.module, site.weight_name, weight.shape[0])
        draw = torch.randn(weight.shape, dtype=torch.float32, device=weight.device).unflatten(0, (blocks, -1))
        weight.copy_(qr_orthogonalize(draw).flatten(0, 1))


def _swap(model: nn.Module, swaps: Swaps, chosen: Choice) -> list[Change]:
    rows = []
    for module, paths in reversed(named_modules(model).items()):  # children first: a parent's swap may take them over
        make = swaps.get(type(module))
        if make is None or not chosen(paths, module):
            continue
        kind = type(module).__name__
        if any(isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer) for path in paths):
            rows.append(Change(paths[0], kind, (), "left", "torch's fused encoder layer reads its numbers"))
            continue
        if paths == [""]:
            rows.append(Change("", kind, (), "left", "the model itself cannot be swapped in place"))
            continue
        new = make(module)
        if new is None:
            rows.append(Change(paths[0], kind, (), "left", "its swap leaves this one"))
            continue
        new.train(module.training)
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        made = str(new) if next(new.children(), None) is None else type(new).__name__
        rows.append(Change(paths[0], kind, (), "swapped", f"for {made}"))
    return rows[::-1]
