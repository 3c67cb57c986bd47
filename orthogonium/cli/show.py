"""Tables and text for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthogonium.certification import NetworkBound
from orthogonium.training import Evaluation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(stderr: bool = False) -> "Console":
    """Where to print; plain text when it is not a terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def certified_table(result: Evaluation, radii: Sequence[float]) -> "Table":
    """Accuracy by radius: proved, and under attack where there was one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("ℓ2 radius", justify="right")
    table.add_column("certified", justify="right", style="bold")
    if result.attacked:
        table.add_column("under attack", justify="right")
    clean = f"{100 * result.clean_accuracy:.1f} %"
    table.add_row("0 (clean)", clean, *([clean] if result.attacked else []))
    for radius in radii:
        row = [f"{radius:g}", f"{100 * result.certified[radius]:.1f} %"]
        if result.attacked:
            row.append(f"{100 * result.attacked[radius]:.1f} %")
        table.add_row(*row)
    return table


def bound_table(bounds: NetworkBound) -> "Table":
    """The constant of every call, and the bound of the network up to there."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("layer", "what"):
        table.add_column(name, no_wrap=True)
    for name in ("constant", "bound so far"):
        table.add_column(name, justify="right")
    for layer in bounds.layers:
        table.add_row(layer.path or "(model)", layer.kind, f"{layer.constant:.9f}", f"{layer.bound:.9f}")
    return table
