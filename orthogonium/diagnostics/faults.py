"""Which layers are to blame when a signal dies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import nn

from orthogonium.diagnostics._observation import Observed
from orthogonium.diagnostics.layer_signal import LayerSignal
from orthogonium.initialization.empirical.folding import is_normalization
from orthogonium.initialization.empirical.normed import Normed

_MANY, _NEARLY_ALL = 0.5, 0.9  # of the units or entries
_SMALL, _LARGE = 1 / 30, 30.0  # a layer's gain; torch's default is 0.58, and ReLU halves the energy
_ALIKE = 0.99999  # cosine between outputs for different inputs
_DRIFT = 1e4  # between the gradients at the first and the last layer


@dataclass(frozen=True)
class Fault:
    """``kind`` is one of ``"dead"``, ``"saturated"``, ``"shrinks"``, ``"grows"``, ``"not finite"``, ``"collapsed"``,
    ``"no gradient"``, ``"vanishing gradient"`` and ``"exploding gradient"``; ``message`` says what was seen.
    """

    layer: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}: {self.message}"


def find_faults(calls: Sequence[Observed], layers: Sequence[LayerSignal]) -> list[Fault]:
    """Causes, not consequences: what a fault leads to further on is not reported again."""
    faults: list[Fault] = []
    for call, row in zip(calls, layers, strict=True):
        found = next(_own_faults(call, row, calls, faults), None)
        if found is not None:
            faults.append(found)
    broken = {fault.kind for fault in faults}
    if not broken & {"dead", "not finite"}:
        faults += _collapse(layers) if not broken & {"shrinks", "saturated"} else ()
        faults += _missing_gradient(layers)
    if {fault.kind for fault in faults} <= {"collapsed"}:
        faults += _drift(layers)
    return faults


def _own_faults(call: Observed, row: LayerSignal, calls: Sequence[Observed], before: list[Fault]) -> Iterator[Fault]:
    if not isfinite(row.activation_rms):
        if not any(fault.kind == "not finite" for fault in before):
            yield Fault(row.name, "not finite", "the output holds NaN or infinite numbers, for the first time here")
        return
    fed_zeros = call.input_dead is not None and call.input_dead > _MANY
    if row.dead > (_NEARLY_ALL if _is_constant(call) else _MANY) and not fed_zeros:
        yield Fault(row.name, "dead", f"{100 * row.dead:.0f} % of its units are zero for every input of the batch")
    position = calls.index(call)
    if fed_zeros and not any(other.dead > _MANY for other in calls[:position]) and position:
        yield Fault(
            calls[position - 1].name,
            "dead",
            f"between it and {row.name}, {100 * (call.input_dead or 0):.0f} % of the units become zero for every input",
        )
    if row.saturated is not None and row.saturated > _MANY:
        yield Fault(row.name, "saturated", f"{100 * row.saturated:.0f} % of its entries are where the slope is flat")
    if row.gain is None or not _has_weights(call.module):
        return
    if row.gain < _SMALL:
        yield Fault(row.name, "shrinks", f"differences between inputs shrink to {row.gain:.2g} of their size")
    if row.gain > _LARGE:
        yield Fault(row.name, "grows", f"differences between inputs grow {row.gain:.2g} times")


def _is_constant(call: Observed) -> bool:
    """Whether the units that live say the same for all inputs of the batch, so that a unit is zero for all or none."""
    return call.output_spread is not None and call.output_spread < 0.05 * call.activation_rms


def _has_weights(module: nn.Module) -> bool:
    inner = module.module if isinstance(module, Normed) else module
    # a lookup takes numbers, not signals; a normalisation is there to change sizes
    return next(inner.parameters(), None) is not None and not is_normalization(inner)


def _collapse(layers: Sequence[LayerSignal]) -> Iterator[Fault]:
    known = [row for row in layers if row.correlation is not None]
    first = next((row for row in known if (row.correlation or 0) > _ALIKE), None)
    if first is not None and (known[0].correlation or 0) < 0.9:
        yield Fault(first.name, "collapsed", "from here on, outputs for different inputs point the same way")


def _missing_gradient(layers: Sequence[LayerSignal]) -> Iterator[Fault]:
    for row in reversed(layers):
        if row.gradient_rms is not None and not isfinite(row.gradient_rms):
            yield Fault(row.name, "not finite", "the gradient holds NaN or infinite numbers")
            return
        if row.gradient_rms == 0:
            yield Fault(row.name, "no gradient", "the loss does not change with its output, here and before")
            return


def _drift(layers: Sequence[LayerSignal]) -> Iterator[Fault]:
    known = [row for row in layers if row.gradient_rms]
    if len(known) < 2:
        return
    first, last = known[0].gradient_rms or 0.0, known[-1].gradient_rms or 0.0
    per_layer = (first / last) ** (1 / (len(known) - 1))
    for kind, beyond in (("vanishing gradient", first * _DRIFT < last), ("exploding gradient", first > last * _DRIFT)):
        if beyond:
            yield Fault(
                known[0].name,
                kind,
                f"on the way back it is multiplied by {per_layer:.3f} per layer, {first / last:.1e} in all. "
                "Weights with the critical gain keep it: orthogonium.gain(activation, criterion='critical')",
            )
