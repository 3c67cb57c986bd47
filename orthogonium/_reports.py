"""How reports become text and JSON."""

import math
from collections.abc import Collection, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = (), rule: bool = False) -> str:
    """Cells in columns two spaces apart; those in ``right`` end together, ``rule`` underlines the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if rule:
        named = [width for name, width in zip(rows[0], widths, strict=True) if name]
        lines.insert(1, "  ".join("─" * width for width in named))
    return "\n".join(lines)


def without_infinities(tree: Any) -> Any:
    """``tree`` with ``None`` for numbers that JSON does not know."""
    if isinstance(tree, dict):
        return {key: without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_infinities(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
