"""How many rounding errors is a trained weight away from orthogonal? LAPACK's test ratio, for every preset.

    python benchmarks/lapack_ratio.py --seconds 3 --out docs/benchmarks

The ratio is ``‖I − Q Qᵀ‖₁ / (n u)`` with the unit roundoff ``u`` (half of torch's ``eps``), products taken in float64:
what LAPACK's own tests ask of a QR factorisation, where values up to 30 pass. Up to 1,000 Adam steps at a rate of 1e-2
on a regression with random data, at n = 1024 up to 20; presets that are slower take as many as fit in ``--seconds`` of
process time.
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import orthogonium as og

STEPS = {16: 1000, 64: 1000, 256: 1000, 1024: 20}


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
    while done < STEPS[n]:
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        done += 1
        if done % max(1, STEPS[n] // 10) == 0:
            worst = max(worst, ratio(layer.weight))
        if time.process_time() - began > seconds:
            break
    weight = layer.eval().weight
    last, spectral = ratio(weight), ratio(weight, 2)
    row = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "n": n, "steps": done}
    return row | {"ratio": last, "worst": max(worst, last), "spectral": spectral}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60, help="process time for one preset, dtype and width")
    parser.add_argument("--presets", nargs="+", default=list(og.PRESETS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--out", type=Path, help="folder for lapack_ratio.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [
        measure(preset, dtype, n, arguments.seconds)
        for preset in arguments.presets
        for dtype in (torch.float32, torch.float64)
        for n in arguments.sizes
    ]
    table = Table("preset", "dtype", "n", "steps", "ratio", "worst on the way", "with the 2-norm")
    for row in cells:
        figures = (f"{row[key]:.2f}" for key in ("ratio", "worst", "spectral"))
        table.add_row(row["preset"], row["dtype"], str(row["n"]), str(row["steps"]), *figures)
    Console().print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "lapack_ratio.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(cells[0]))
            writer.writeheader()
            writer.writerows({**row, **{k: f"{row[k]:.3g}" for k in ("ratio", "worst", "spectral")}} for row in cells)


if __name__ == "__main__":
    main()
