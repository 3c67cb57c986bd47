"""What a conversion did, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orthogonium._reports import aligned


@dataclass(frozen=True)
class Change:
    """One weight or module of the model, and what became of it.

    Attributes:
        name: path of the weight or module; the first where there are several.
        kind: class of the module.
        shape: of the weight; empty for a module.
        action: ``"orthogonal"``, ``"almost orthogonal"``, ``"tied"``, ``"swapped"`` or ``"left"``.
        detail: how, or why not.
        distance: Frobenius norm of the difference between the weight before and after, relative to the weight before;
            ``None`` where nothing was changed or there is no value (meta).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: str
    detail: str
    distance: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`orthogonium.convert` changed and what it left; prints as a table.

    Attributes:
        rows: every weight of a module that could be meant, in the order of the model.
        bound_before, bound_after: Lipschitz bounds of the network; ``None`` where none is known.
        unknown: why there is no bound afterwards.
    """

    rows: Sequence[Change]
    bound_before: float | None = None
    bound_after: float | None = None
    unknown: str = field(default="", repr=False)

    @property
    def changed(self) -> list[Change]:
        """The rows whose weight is constrained now, or whose module is another one."""
        return [row for row in self.rows if row.action != "left"]

    @property
    def left(self) -> list[Change]:
        """The rows that stay as they were; ``detail`` says why."""
        return [row for row in self.rows if row.action == "left"]

    def __str__(self) -> str:
        lines = [("name", "module", "shape", "action", "distance", "")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            distance = "" if row.distance is None else f"{row.distance:.3f}"
            lines.append((row.name, row.kind, shape, row.action, distance, row.detail))
        table = [aligned(lines, right=(4,), rule=True)]
        before, after = (_number(bound) for bound in (self.bound_before, self.bound_after))
        table.append(f"{len(self.changed)} changed, {len(self.left)} left; Lipschitz bound {before} → {after}")
        if self.bound_after is None and self.unknown:
            table.append(f"no bound: {self.unknown}")
        return "\n".join(table)


def _number(bound: float | None) -> str:
    return "unknown" if bound is None else f"{bound:.6g}"
