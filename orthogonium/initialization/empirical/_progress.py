"""A progress bar for runs that take long, and nothing for others."""

import sys
import time
from typing import Any

_PATIENCE = 2.0  # seconds before a bar appears


class Progress:
    """Counts steps out of ``total``; draws a bar on a terminal once that takes more than two seconds.

    Drawn by ``rich`` where it is installed, as one rewritten line elsewhere; never into files or pipes.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self._start = time.monotonic()
        self._shown = -1
        self._rich: Any = None
        self._active = sys.stderr is not None and sys.stderr.isatty()

    def advance(self) -> None:
        self.done = min(self.done + 1, self.total)
        if self._active and time.monotonic() - self._start > _PATIENCE:
            self._draw()

    def _draw(self) -> None:
        percent = 100 * self.done // self.total
        if percent == self._shown:
            return
        if self._shown < 0:
            self._rich = _rich_bar(self.label, self.total)
        self._shown = percent
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=self.done)
        else:
            print(f"\r{self.label} {percent:3d} %", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._shown >= 0:
            print(file=sys.stderr)


def _rich_bar(label: str, total: int) -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        return None
    bar = Bar(console=Console(stderr=True), transient=True)
    bar.add_task(label, total=total)
    bar.start()
    return bar
