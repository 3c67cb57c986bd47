"""What tuning measured and set."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from orthogonium._reports import aligned, without_infinities


@dataclass(frozen=True)
class ModuleScales:
    """One wrapped module: its factors, and the sizes that they lead to.

    ``activation_rms``, ``gradient_rms`` and ``update_rms`` are root mean squares with the factors in place, averaged
    geometrically over calls and outputs; ``update_rms`` is the change of the outputs by a step of plain gradient
    descent with learning rate one, to first order. ``None`` where there was nothing to measure, as ``note`` says.
    """

    name: str
    kind: str
    calls: int
    activation_scale: tuple[float, ...]
    gradient_scale: tuple[float, ...]
    update_scale: float
    activation_rms: float | None
    gradient_rms: float | None
    update_rms: float | None
    note: str = ""


@dataclass(frozen=True)
class ScaleReport:
    """Scales and sizes of every wrapped module, in the order in which they were first called.

    ``str(report)`` is a table. ``passes`` counts runs of the model; ``seconds`` is processor time.
    """

    modules: tuple[ModuleScales, ...]
    passes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; infinite and undefined numbers become ``null``."""
        return json.dumps(without_infinities(self.to_dict()), indent=2)

    def extremes(self) -> dict[str, tuple[float, float]]:
        """Least and largest RMS of ``"activation"``, ``"gradient"`` and ``"update"`` over all modules that have one."""
        found = {}
        for what in ("activation", "gradient", "update"):
            values = [v for row in self.modules if (v := getattr(row, f"{what}_rms")) is not None]
            if values:
                found[what] = (min(values), max(values))
        return found

    def table(self) -> str:
        """One line per module, then the notes."""
        head = ("module", "type", "calls", "activations", "gradients", "updates", "scales", "")
        rows: list[tuple[str, ...]] = [head]
        for row in self.modules:
            sizes = [_short(v) for v in (row.activation_rms, row.gradient_rms, row.update_rms)]
            scales = " ".join((_join(row.activation_scale), _join(row.gradient_scale), f"{row.update_scale:.3g}"))
            rows.append((row.name, row.kind, str(row.calls), *sizes, scales, row.note))
        return "\n".join([aligned(rows, right=range(2, 6)), *self.notes])

    def __str__(self) -> str:
        plural = "" if self.passes == 1 else "es"
        return f"{self.table()}\n{len(self.modules)} modules, {self.passes} pass{plural}, {self.seconds:.3g} s"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _join(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.3g}" for value in values)
