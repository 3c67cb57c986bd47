"""What does a recipe reach on the digits? Trains it from several seeds and prints each run and the mean.

python benchmarks/digits.py --recipe balanced --seeds 5
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from orthogonium.cli import main as orthogonium

RADII = ("0.1", "0.25", "0.5", "1.0")


def figures(metrics: dict) -> list[float]:
    """Percentages, clean and certified, the bound's excess over one in millionths, and seconds."""
    shares = [metrics["clean_accuracy"], *(metrics["certified_accuracy"][radius] for radius in RADII)]
    return [100 * share for share in shares] + [1e6 * (metrics["lipschitz_bound"] - 1), metrics["seconds"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--model", default="mlp")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            run = Path(folder) / str(seed)
            choice = ["--recipe", options.recipe, "--preset", options.preset, "--model", options.model]
            status = orthogonium(["train", *choice, "--seed", str(seed), "--out", str(run)])
            if status:
                return status
            rows.append(figures(json.loads((run / "metrics.json").read_text())))
    print(
        f"\n{options.model}, {options.recipe}, preset {options.preset}\n seed  clean  "
        + "  ".join(f"{r:>5}" for r in RADII),
        end="",
    )
    print("  bound−1 (1e-6)  seconds")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    for name, row in [*((str(seed), row) for seed, row in enumerate(rows)), ("mean", means)]:
        print(f"{name:>5}  " + "  ".join(f"{value:5.1f}" for value in row[:5]) + f"  {row[5]:14.2f}  {row[6]:7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
