"""Where signals grow, die and stop: one row per layer, from one forward and one backward pass."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._randomness import own_randomness
from orthogonium._reports import aligned, without_infinities
from orthogonium.diagnostics._observation import (
    Observed,
    Run,
    as_function_of_one_input,
    is_coupled,
    observe,
)
from orthogonium.diagnostics._signal_plot import plot_signal
from orthogonium.diagnostics.faults import Fault, find_faults
from orthogonium.diagnostics.jacobian import JacobianExtremes, jacobian_extremes
from orthogonium.diagnostics.layer_signal import LayerSignal
from orthogonium.initialization.empirical._trees import arguments_of, rms
from orthogonium.initialization.empirical._updates import kept
from orthogonium.initialization.empirical.normed import Normed, true_gradients

_HEAD = ("layer", "type", "activation", "gradient", "gain", "σ min", "σ max", "dead", "saturated", "cosine", "Δw/w")


@dataclass(frozen=True)
class SignalReport:
    """What :func:`signal_report` found: ``layers`` in the order of their calls, ``jacobian`` of the whole model at the
    first input, and ``faults``, the layers at which something goes wrong. ``str(report)`` is the table and the faults.
    """

    layers: tuple[LayerSignal, ...]
    jacobian: JacobianExtremes | None
    faults: tuple[Fault, ...]

    def table(self) -> str:
        """One line per call of a layer; ``≤`` marks a singular value that is only an upper bound."""
        rows: list[tuple[str, ...]] = [_HEAD]
        for row in self.layers:
            least = "" if row.sigma_min is None else ("" if row.sigma_is_exact else "≤ ") + f"{row.sigma_min:.2g}"
            rows.append((
                row.name, row.kind, _number(row.activation_rms), _number(row.gradient_rms), _number(row.gain), least,
                _number(row.sigma_max), _percent(row.dead), _percent(row.saturated), _fixed(row.correlation),
                _number(row.update_ratio),
            ))  # fmt: skip
        return aligned(rows, right=range(2, len(_HEAD)))

    def __str__(self) -> str:
        lines = [self.table(), ""]
        if self.jacobian is not None:
            least = ("" if self.jacobian.exact else "≤ ") + f"{self.jacobian.smallest:.3g}"
            lines.append(f"Jacobian of the model at the first input: σ max {self.jacobian.largest:.3g}, σ min {least}")
        lines += [str(fault) for fault in self.faults] or ["No faults found."]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; infinite and undefined numbers become ``null``."""
        return json.dumps(without_infinities(self.to_dict()), indent=2)

    def plot(self, path: str | Path) -> None:
        """Draw sizes, gains and faults over depth into a picture; needs matplotlib."""
        plot_signal(path, self.layers, self.faults)


def signal_report(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    learning_rate: float = 1.0,
    jacobian: str = "layers",
    steps: int = 30,
) -> SignalReport:
    """Follow activations and gradients through a model, and name the layers at which they die.

    One forward and one backward pass give everything but Jacobians. Layers are modules with parameters of their own and
    modules without parts, such as activations; functions called in a ``forward`` are not seen, only what they leave for
    the next layer. The model is run in its present mode. Weights, ``.grad``, buffers and the random state stay as they
    are.

    Args:
        model: any module.
        batch: its input, with inputs counted along the first axis; a tuple is passed as several arguments, a dict by
            keyword.
        loss: the model's output to one number, for example ``lambda out: cross_entropy(out, labels)``; without one, a
            fixed random combination of the outputs.
        learning_rate: for the ratio of update to weight, of plain gradient descent.
        jacobian: ``"layers"`` for the singular values of each layer with parameters and of the model, ``"model"`` for
            those of the model alone, ``"none"``.
        steps: of the Lanczos iteration, where more than 256 inputs and outputs forbid writing a Jacobian out.

    Raises:
        ValueError: no tensor in ``batch``, a loss that is not one number, or an unknown ``jacobian``.
    """
    if jacobian not in ("layers", "model", "none"):
        raise ValueError(f"jacobian must be 'layers', 'model' or 'none', got {jacobian!r}")
    run = observe(model, batch, loss, keep="first" if jacobian == "layers" else "none")
    whole = None
    spectra: dict[int, JacobianExtremes] = {}
    with kept(list(model.buffers())), true_gradients(model), own_randomness():
        if jacobian != "none":
            whole = _extremes(model, *arguments_of(batch), run.batch_size, steps)
        if jacobian == "layers":
            for position, call in enumerate(run.calls):
                if next(call.module.parameters(), None) is not None:
                    left = run.batch_size if is_coupled(call.module) else 1  # inputs that were kept
                    found = _extremes(call.module, call.args, call.kwargs, left, steps)
                    if found is not None:
                        spectra[position] = found
    layers = tuple(_layer(call, run, learning_rate, spectra.get(i)) for i, call in enumerate(run.calls))
    return SignalReport(layers, whole, tuple(find_faults(run.calls, layers)))


def _extremes(module: nn.Module, args: Any, kwargs: Any, batch_size: int, steps: int) -> JacobianExtremes | None:
    found = as_function_of_one_input(module, args, kwargs, batch_size)
    return None if found is None else jacobian_extremes(*found, steps=steps)


def _layer(call: Observed, run: Run, learning_rate: float, spectrum: JacobianExtremes | None) -> LayerSignal:
    inner = call.module.module if isinstance(call.module, Normed) else call.module
    return LayerSignal(
        name=call.name,
        kind=(type(inner).__mro__[1] if is_parametrized(inner) else type(inner)).__name__,
        activation_rms=call.activation_rms,
        activation_mean=call.activation_mean,
        gradient_rms=call.gradient_rms,
        gradient_mean=call.gradient_mean,
        gain=_ratio(call.output_spread, call.input_spread),
        dead=call.dead,
        saturated=call.saturated,
        correlation=call.correlation,
        update_ratio=_update_ratio(call.module, run, learning_rate),
        sigma_max=None if spectrum is None else spectrum.largest,
        sigma_min=None if spectrum is None else spectrum.smallest,
        sigma_is_exact=None if spectrum is None else spectrum.exact,
    )


def _update_ratio(module: nn.Module, run: Run, learning_rate: float) -> float | None:
    parameters = [p for p in module.parameters() if p in run.gradients]
    weights = [p for p in parameters if p.ndim >= 2] or parameters
    size = math.hypot(*(rms(p) * p.numel() ** 0.5 for p in weights))
    change = math.hypot(*(rms(run.gradients[p]) * p.numel() ** 0.5 for p in weights))
    return learning_rate * change / size if size > 0 else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under is not None and under > 0 else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
