"""What all pictures share: drawn without a display, in colours that survive colour blindness."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito, "Color universal design", 2008.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6b6b6b"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}


@contextmanager
def figure(path: Path | str, columns: int, size: tuple[float, float], rows: int = 1) -> Iterator[Sequence[Any]]:
    """Axes to draw on, row by row; the picture is written and closed afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawing = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawing)
        yield list(drawing.subplots(rows, columns, squeeze=False).flat)
        drawing.savefig(path)
