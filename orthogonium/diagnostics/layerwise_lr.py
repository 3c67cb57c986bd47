"""Learning rates that move the outputs of every layer by the same amount."""

from __future__ import annotations

from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium._randomness import own_randomness
from orthogonium.diagnostics._observation import Observed, Run, observe
from orthogonium.initialization.empirical._trees import signals
from orthogonium.initialization.empirical._updates import Call, kept, moved_outputs, random_state, set_random_state

_OPTIMIZERS = ("adam", "sgd")


def layerwise_lr(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    change: float = 1e-2,
    optimizer: str = "adam",
) -> list[dict[str, Any]]:
    """Parameter groups in which one step changes the outputs of every layer by ``change``, in root mean square.

    The sizes are measured: one forward and one backward pass give the optimiser's first step, and each layer is run
    once more with weights moved a little along it. A wider layer sums more changes, so its rate comes out smaller; with
    rates from here a learning rate found on a small model serves a wide one.

    Args:
        model: left as it is.
        batch: its input, with inputs counted along the first axis; a tuple is passed as several arguments, a dict by
            keyword.
        loss: the model's output to one number, for example ``lambda out: cross_entropy(out, labels)``; without one, a
            fixed random combination of the outputs.
        change: what one step does to outputs, to first order. Outputs of order one and 0.01 are a fast start.
        optimizer: ``"adam"`` (also for AdamW, Lion and others whose first step is the sign of the gradient) or
            ``"sgd"``.

    Returns:
        one group per layer, ``{"params": [...], "lr": ..., "name": ...}``, for ``torch.optim.Adam(groups)``. Trainable
        parameters outside layers, and layers without a gradient, get the geometric mean of the other rates.

    Raises:
        ValueError: an unknown optimiser, ``change`` not positive, a loss that is not one number, or no gradient at all.

    Source: Yang and Hu, "Tensor programs IV: feature learning in infinite-width neural networks", ICML 2021.
    """
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
    if not 0 < change < float("inf"):
        raise ValueError(f"change must be finite and above 0, got {change}")
    sizes = update_sizes(model, batch, loss, optimizer)
    if not sizes:
        raise ValueError("no layer gets a gradient from this loss. Look at signal_report(model, batch, loss)")
    names = {module: name for name, module in model.named_modules()}
    groups: list[dict[str, Any]] = []
    placed: set[nn.Parameter] = set()
    for module, size in sizes.items():
        own = [p for p in module.parameters() if p.requires_grad and p not in placed]
        if own:
            placed.update(own)
            groups.append({"params": own, "lr": change / size, "name": names[module]})
    rest = [p for p in model.parameters() if p.requires_grad and p not in placed]
    if rest:
        groups.append({"params": rest, "lr": geometric_mean([group["lr"] for group in groups]), "name": "the rest"})
    return groups


def update_sizes(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None, optimizer: str = "adam"
) -> dict[nn.Module, float]:
    """By layer, the root mean square by which its outputs change per unit of learning rate in the first step."""
    run = observe(model, batch, loss)
    calls: dict[nn.Module, list[Observed]] = {}
    for call in run.calls:
        calls.setdefault(call.module, []).append(call)
    sizes = {}
    for module, found in calls.items():
        directions = _directions(module, run, optimizer)
        if directions:
            size = _size(module, found, directions)
            if 0 < size < float("inf"):
                sizes[module] = size
    return sizes


def _directions(module: nn.Module, run: Run, optimizer: str) -> dict[nn.Parameter, Tensor]:
    own = {p: run.gradients[p] for p in module.parameters() if p in run.gradients}
    if not all(bool(torch.isfinite(g).all()) for g in own.values()) or not any(bool(g.any()) for g in own.values()):
        return {}
    return {p: g.sign() if optimizer == "adam" else g for p, g in own.items()}


def _size(module: nn.Module, found: list[Observed], directions: dict[nn.Parameter, Tensor]) -> float:
    device = next(iter(directions)).device
    state = random_state(device)  # the same dropout before and after
    calls = []
    with torch.no_grad(), kept(list(module.buffers())), own_randomness():
        for observed in found:
            set_random_state(state, device)
            before = [t.detach().clone() for t in signals(module(*observed.args, **observed.kwargs))]
            calls.append(Call(observed.args, observed.kwargs, before, state))
    changes, step = moved_outputs(module, calls, directions, 0.0)
    flat = [change.double().square() for outputs in changes for change in outputs]
    return float(sum(c.sum() for c in flat) / sum(c.numel() for c in flat)) ** 0.5 / step
