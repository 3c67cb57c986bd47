"""A signal report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthogonium.diagnostics._figure import BLUE, GREY, ORANGE, figure
from orthogonium.diagnostics.faults import Fault
from orthogonium.diagnostics.layer_signal import LayerSignal

_GREEN = "#009E73"
_NAMED = 26  # layers up to which each gets its name


def plot_signal(path: str | Path, layers: Sequence[LayerSignal], faults: Sequence[Fault]) -> None:
    """Three panels over depth: sizes, gains with singular values, and what is dead, flat or alike."""
    with figure(path, 1, (8.0, 8.2), rows=3) as (sizes, gains, shares):
        sizes.set_title("Size of the signal")
        _line(sizes, [row.activation_rms for row in layers], BLUE, "activations", "o")
        _line(sizes, [row.gradient_rms for row in layers], ORANGE, "gradients", "s")
        sizes.set_ylabel("root mean square")
        gains.set_title("Gain of each layer")
        _line(gains, [row.gain for row in layers], BLUE, "differences between inputs", "o")
        for number, row in enumerate(layers):
            if row.sigma_max is not None and row.sigma_min is not None and row.sigma_max > 0:
                low = max(row.sigma_min, 1e-3 * row.sigma_max)
                gains.plot([number, number], [low, row.sigma_max], color=GREY, linewidth=3, alpha=0.45, zorder=1)
        gains.plot([], [], color=GREY, linewidth=3, alpha=0.45, label="singular values (down to 1/1,000)")
        gains.axhline(1, color=GREY, linewidth=1)
        gains.set_ylabel("factor")
        for axes in (sizes, gains):
            axes.set_yscale("log")
        shares.set_title("What gets lost")
        _line(shares, [row.correlation for row in layers], BLUE, "cosine between two inputs", "o")
        _line(shares, [row.dead for row in layers], ORANGE, "dead units", "s")
        _line(shares, [row.saturated for row in layers], _GREEN, "saturated entries", "^")
        shares.set_ylim(min(-0.05, 1.1 * min((row.correlation or 0 for row in layers), default=0)), 1.08)
        shares.set_ylabel("share, or cosine")
        _mark_faults((sizes, gains, shares), layers, faults)
        for axes in (sizes, gains, shares):
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=3, borderaxespad=0.1)
            axes.set_xlim(-0.6, len(layers) - 0.4)
            if len(layers) <= _NAMED:
                axes.set_xticks(range(len(layers)), [""] * len(layers))
        if len(layers) <= _NAMED:
            names = [f"{row.name} {row.kind}" for row in layers]
            shares.set_xticks(range(len(layers)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        else:
            shares.set_xlabel("layer, in the order of the calls")


def _line(axes: Any, values: Sequence[float | None], colour: str, label: str, marker: str) -> None:
    points = [(number, value) for number, value in enumerate(values) if value is not None]
    if points:
        x, y = zip(*points, strict=True)
        dense = len(values) > _NAMED
        axes.plot(x, y, color=colour, label=label, marker="" if dense else marker, markersize=4, linewidth=1.5)


def _mark_faults(panels: Sequence[Any], layers: Sequence[LayerSignal], faults: Sequence[Fault]) -> None:
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.layer, []).append(fault.kind)
    for number, row in enumerate(layers):
        if row.name not in kinds:
            continue
        for axes in panels:
            axes.axvspan(number - 0.4, number + 0.4, color=ORANGE, alpha=0.14, linewidth=0)
        panels[0].annotate(
            ", ".join(kinds[row.name]), (number, 1), (0, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", rotation=90, fontsize=8, color=ORANGE,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )  # fmt: skip
