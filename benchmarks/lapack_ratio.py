"""How many rounding errors is a trained weight away from orthogonal? LAPACK's test ratio, for every preset.

    python benchmarks/lapack_ratio.py --seconds 3 --out docs/benchmarks

The ratio is ``‖I − Q Qᵀ‖₁ / (n u)`` with the unit roundoff ``u`` (half of torch's ``eps``), products taken in float64:
what LAPACK's own tests ask of a QR factorisation, where values up to 30 pass. 1,000 Adam steps at a rate of 1e-2 on a
regression with random data; slow presets take as many as fit in ``--seconds`` of process time. Each figure is
written to ``lapack_ratio.csv`` when it is known, in place of an earlier one for the same preset, dtype and width.
"""

import argparse
import csv
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import orthogonium as og

SIZES = (16, 64, 256, 1024)
STEPS = 1000
KEY = ("preset", "dtype", "n")


def ratio(weight: Tensor, order: float = 1) -> float:
    """``‖I − Q Qᵀ‖ / (n u)``."""
    n, unit = weight.shape[-1], torch.finfo(weight.dtype).eps / 2
    q = weight.detach().double()
    error = torch.eye(n, dtype=torch.float64) - q @ q.mT
    return float(torch.linalg.matrix_norm(error, order)) / (n * unit)


def measure(preset: str, dtype: torch.dtype, n: int, seconds: float) -> dict[str, Any]:
    """Train one layer; the last ratio, the largest of ten on the way, and how far that was from the start."""
    torch.manual_seed(0)
    layer = og.OrthoLinear(n, n, bias=False, ortho_params=og.PRESETS[preset], dtype=dtype)
    free = layer.parametrizations.weight.original
    with torch.no_grad():
        free.copy_(torch.randn(n, n, dtype=dtype) / math.sqrt(n))
    optimizer = torch.optim.Adam([free], 1e-2)
    x, target = torch.randn(2, 64, n, dtype=dtype)
    worst, began, done = ratio(layer.weight), time.process_time(), 0
    while done < STEPS:
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        done += 1
        if done % (STEPS // 10) == 0:
            worst = max(worst, ratio(layer.weight))
        if time.process_time() - began > seconds:
            break
    weight = layer.eval().weight
    last, spectral = ratio(weight), ratio(weight, 2)
    row = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "n": n, "steps": done}
    return row | {"ratio": last, "worst": max(worst, last), "spectral": spectral}


def remember(row: dict[str, Any], path: Path) -> None:
    """Put one row into the file of all rows, in the order of presets, dtypes and widths."""
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rows = [old for old in rows if any(old[key] != str(row[key]) for key in KEY)]
    rows.append({**row, **{key: f"{row[key]:.3g}" for key in ("ratio", "worst", "spectral")}})
    rows.sort(key=lambda r: (list(og.PRESETS).index(r["preset"]), r["dtype"], int(r["n"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60, help="process time for one preset, dtype and width")
    parser.add_argument("--presets", nargs="+", choices=list(og.PRESETS), default=list(og.PRESETS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--out", type=Path, help="folder for lapack_ratio.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("preset", "dtype", "n", "steps", "ratio", "worst on the way", "with the 2-norm")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for dtype, n, preset in itertools.product(arguments.dtypes, arguments.sizes, arguments.presets):
        row = measure(preset, getattr(torch, dtype), n, arguments.seconds)
        figures = (f"{row[key]:.2f}" for key in ("ratio", "worst", "spectral"))
        table.add_row(row["preset"], row["dtype"], str(row["n"]), str(row["steps"]), *figures)
        if arguments.out:
            remember(row, arguments.out / "lapack_ratio.csv")
    Console().print(table)


if __name__ == "__main__":
    main()
