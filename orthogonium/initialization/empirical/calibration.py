"""Weights scaled so that every layer's outputs have one size, without wrappers."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from typing import Any

import torch
from torch import nn

from orthogonium.initialization.empirical._record import Record
from orthogonium.initialization.empirical._trees import arguments_of, map_signals, rms
from orthogonium.initialization.empirical._updates import Call, kept
from orthogonium.initialization.empirical.folding import is_normalization, multiply_weights, why_not
from orthogonium.initialization.empirical.normed import Normed, is_scaled, leaves
from orthogonium.initialization.empirical.report import ScaleReport

_PASSES = 4


def calibrate(
    model: nn.Module,
    batch: Any,
    target: float = 1.0,
    include: Callable[[str, nn.Module], bool] | None = None,
) -> ScaleReport:
    """Scale the weights of every layer, in place, so that its outputs on ``batch`` have root mean square ``target``.

    One forward pass does it at any depth, since each output is scaled before the next layer sees it; up to four where
    layers are reused. Weights keep their directions, and biases are scaled along. Running statistics, modes and
    gradients are left as they are.

    Left alone, as the notes of the report say: normalisation layers, recurrent layers and other modules not known to be
    linear in their weights, constrained, frozen and shared weights.

    Args:
        model: to change.
        batch: its input; a tuple is passed as several arguments, a dict by keyword.
        target: root mean square of the outputs.
        include: called with name and module of each layer; those for which it is false are left alone.

    Returns:
        the factors, and the sizes that they lead to.

    Raises:
        ValueError: ``target`` is not finite and positive, or ``model`` holds wrapped modules.

    Source: Mishkin and Matas, "All you need is a good init", ICLR 2016, with several passes for each layer.
    """
    if not 0 < target < inf:
        raise ValueError(f"target must be finite and above 0, got {target}")
    if any(isinstance(module, Normed) for module in model.modules()):
        raise ValueError("model holds Normed modules. Tune them with empirical_init, or fold_scales(model) first")
    start = time.process_time()
    args, kwargs = arguments_of(batch)
    records: dict[nn.Module, Record] = {}
    reasons: dict[nn.Module, str] = {}
    names: dict[nn.Module, str] = {}
    for name, module in leaves(model):
        names[module] = name
        reason = "left out" if include is not None and not include(name, module) else ""
        reason = reason or ("normalises" if is_normalization(module) else why_not(module, model))
        if reason:
            reasons[module] = reason
        records[module] = Record(module)

    order: list[nn.Module] = []

    def scale(module: nn.Module, _: Any, output: Any) -> Any:
        record = records[module]
        if not record.calls:
            order.append(module)
        call = record.begin(Call((), {}, [], []))

        def see(number: int, tensor: torch.Tensor) -> torch.Tensor:
            if not is_scaled(module, number):
                return tensor
            factor = record.see_activation(call, number, rms(tensor) / target)
            return tensor if module in reasons else tensor * factor

        return map_signals(see, output)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(kept(list(model.buffers())))
        for module in records:
            stack.callback(module.register_forward_hook(scale).remove)
        passes, settled = 0, False
        while not settled and passes < _PASSES:
            passes += 1
            for record in records.values():
                record.forget()
            order.clear()
            model(*args, **kwargs)
            found = [record.settle() for module, record in records.items() if module not in reasons]
            settled = all(found)
    rows = []
    for module in order + [m for m in records if m not in order]:
        record = records[module]
        if module in reasons:
            record.activation = [1.0]
        elif record.calls:
            multiply_weights(module, record.activation[0])
        rows.append(record.row(names[module], reasons.get(module, ""), target))
    return ScaleReport(tuple(rows), passes, time.process_time() - start)
