"""How long does an orthogonal weight take, and how good is it? Every preset and its peers, in one interleaved run.

    python benchmarks/orthogonalizers.py --peer PATH --out docs/benchmarks

``--peer PATH`` is a folder with another library that imports as ``orthogonium``; it runs in a process of its own.
Times are process time (wall time on a GPU) in units of the *pair*: the two matrix products of ``(W Wᵀ) W`` for that
shape, measured by the same process right before. Figures are medians.
"""

import argparse
import csv
import math
import platform
import random
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _workers import Worker
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).resolve().parent
SHAPES = [(64, 64), (256, 256), (512, 512), (1024, 1024), (256, 1024), (1024, 256), (16, 128, 128), (64, 32, 32)]
OURS = ["POLAR", "DEFAULT", "BJORCK_PASS_THROUGH", "CHOLESKY", "CHOLESKY_STABLE", "QR", "SVD", "EXP", "CAYLEY"]
PEERS = ["DEFAULT", "DEFAULT_TEST", "CHOLESKY", "QR", "EXP"]
TORCH = ["svd", "matrix_exp", "cayley", "householder"]
THIN = (1024, 64)
VISITS, QUICK = 3, 0.2  # in a round, of what a goal compares and takes fewer seconds

# (label, theirs, ours, start, {shape: goal}); the goal is the least ratio of their time to ours, forward and backward.
SQUARE: dict[tuple[int, ...], float] = {(256, 256): 4.0, (512, 512): 4.0, (1024, 1024): 4.0}
GOALS: list[tuple[str, tuple[str, str], tuple[str, str], str, dict[tuple[int, ...], float]]] = [
    (
        "polar / peer DEFAULT",
        ("peer", "DEFAULT"),
        ("ours", "POLAR"),
        "kappa-4",
        SQUARE | {(256, 1024): 6.0, (1024, 256): 6.0, (64, 64): 3.5, (16, 128, 128): 3.5, (64, 32, 32): 2.0},
    ),
    (
        "polar / peer DEFAULT",
        ("peer", "DEFAULT"),
        ("ours", "POLAR"),
        "kappa-20",
        SQUARE | {(256, 1024): 6.0, (1024, 256): 6.0, (64, 64): 3.5, (16, 128, 128): 3.5, (64, 32, 32): 2.0},
    ),
    (
        "polar / peer DEFAULT",
        ("peer", "DEFAULT"),
        ("ours", "POLAR"),
        "near",
        dict.fromkeys(SQUARE, 5.5) | {(256, 1024): 9.0},
    ),
    ("polar / peer DEFAULT_TEST", ("peer", "DEFAULT_TEST"), ("ours", "POLAR"), "kappa-4", dict.fromkeys(SQUARE, 8.0)),
    ("polar / torch matrix_exp", ("torch", "matrix_exp"), ("ours", "POLAR"), "kappa-4", dict.fromkeys(SQUARE, 5.5)),
    ("polar / torch SVD", ("torch", "svd"), ("ours", "POLAR"), "kappa-4", dict.fromkeys(SQUARE, 1.15)),
    (
        "Cholesky / peer CHOLESKY",
        ("peer", "CHOLESKY"),
        ("ours", "CHOLESKY"),
        "kappa-4",
        {shape: 1.3 for shape in SHAPES if shape != (1024, 256)} | {(1024, 256): 8.0},
    ),
    ("Cholesky / peer DEFAULT", ("peer", "DEFAULT"), ("ours", "CHOLESKY"), "kappa-4", dict.fromkeys(SQUARE, 9.0)),
    (
        "exponential / torch matrix_exp",
        ("torch", "matrix_exp"),
        ("ours", "EXP"),
        "kappa-4",
        dict.fromkeys(SQUARE, 3.0) | {THIN: 300.0},
    ),
    (
        "Cayley / torch cayley",
        ("torch", "cayley"),
        ("ours", "CAYLEY"),
        "kappa-4",
        dict.fromkeys(SQUARE, 1.2) | {THIN: 25.0},
    ),
]


def entries(shapes: list[tuple[int, ...]], starts: list[str], libraries: list[str]) -> list[tuple[Any, ...]]:
    """``(library, method, shape, start)`` of everything to be measured."""
    methods = {"ours": OURS, "peer": PEERS, "torch": TORCH, "geotorch": ["orthogonal"], "torchlip": ["bjorck"]}
    found = []
    for shape in shapes:
        for library in libraries:
            for method in methods[library]:
                if shape == THIN and (library, method) not in {
                    ("ours", "EXP"), ("ours", "CAYLEY"), ("torch", "matrix_exp"), ("torch", "cayley"),
                }:  # fmt: skip
                    continue
                skew = method in ("EXP", "CAYLEY", "matrix_exp", "cayley", "householder", "orthogonal")
                for start in starts[:1] if skew else starts:
                    found.append((library, method, shape, start))
    return found


def is_compared(entry: tuple[Any, ...]) -> bool:
    """Whether a goal asks for it."""
    library, method, shape, start = entry
    return any(
        (library, method) in (theirs, ours) and start == wanted and shape in goals
        for _, theirs, ours, wanted, goals in GOALS
    )


def is_quick(reply: dict[str, Any]) -> bool:
    return bool(reply.get("both", math.inf) < QUICK)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per entry, saved round by round.

    A round passes over everything, shape by shape, in an order drawn anew, and some more times over what a goal
    compares unless that takes long: it is near in time, and a slow minute of the machine spoils some samples and not
    their median.
    """
    libraries = ["ours", "torch", *([] if arguments.own else ["geotorch", "torchlip"])]
    libraries += ["peer"] if arguments.peer else []
    paths = {"peer": arguments.peer}
    workers = {name: Worker(HERE / "_contestants.py", name, library=paths.get(name)) for name in libraries}
    shapes = [tuple(int(n) for n in text.split("x")) for text in arguments.shapes]
    if arguments.device == "cpu" and not arguments.own:
        shapes.append(THIN)
    todo = entries(shapes, arguments.starts, libraries)
    samples: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    order = random.Random(0)
    common = {"device": arguments.device, "dtype": arguments.dtype, "scale": 1.0, "seconds": arguments.seconds}
    rows: list[dict[str, Any]] = []
    for _ in track(range(arguments.rounds), transient=True):
        for shape in order.sample(shapes, len(shapes)):
            here = [entry for entry in todo if entry[2] == shape]
            for visit in range(VISITS):
                if visit:
                    here = [entry for entry in here if is_compared(entry) and is_quick(samples[entry][-1])]
                for entry in order.sample(here, len(here)):
                    library, method, _, start = entry
                    request = {"method": method, "shape": shape, "start": start, **common}
                    pair = workers[library].ask(**(request | {"method": "pair", "quality": False}))["forward"]
                    reply = workers[library].ask(**request, quality=not samples[entry])
                    if "error" not in reply:
                        reply["pair"] = pair
                    samples[entry].append(reply)
        rows = [row(entry, samples[entry]) for entry in todo]
        if arguments.out:
            save(rows, arguments.out)
    return rows


def row(entry: tuple[Any, ...], replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one entry, in pairs."""
    library, method, shape, start = entry
    result: dict[str, Any] = {"library": library, "method": method, "shape": "x".join(map(str, shape)), "start": start}
    good = [reply for reply in replies if "error" not in reply]
    if not good:
        return result | {"error": replies[0]["error"]}
    result["pair_ms"] = 1e3 * median(reply["pair"] for reply in good)
    result |= {what: median(reply[what] / reply["pair"] for reply in good) for what in ("forward", "both")}
    result |= {key: good[0].get(key) for key in ("saved", "defect", "distance", "gradient_error")}
    return result


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal that the run covers: their time over ours."""
    time = {(r["library"], r["method"], r["shape"], r["start"]): r for r in rows if "both" in r}
    found = []
    for label, theirs, ours, start, goals in GOALS:
        for shape, goal in goals.items():
            name = "x".join(map(str, shape))
            skew = "exp" in theirs[1] or "cayley" in theirs[1]
            a = time.get((*theirs, name, "kappa-4" if skew else start))
            b = time.get((*ours, name, start))
            if a and b:
                ratio = a["both"] / b["both"]
                found.append({"comparison": label, "start": start, "shape": name, "ratio": ratio, "goal": goal})
    return found


def save(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """``orthogonalizers.csv`` and ``ratios.csv``; shapes that were not measured now stay as they were there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "orthogonalizers.csv"
    measured = {r["shape"] for r in rows}
    known = [parsed(r) for r in csv.DictReader(path.open(newline=""))] if path.exists() else []
    everything = [r for r in known if r["shape"] not in measured] + rows
    for name, content in (("orthogonalizers", everything), ("ratios", ratios(everything))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for r in content for key in r)))
            writer.writeheader()
            writer.writerows(content)
    return everything


def parsed(row: dict[str, str]) -> dict[str, Any]:
    """A row as :func:`row` made it: numbers, and no empty cells."""
    words = {"library", "method", "shape", "start", "error"}
    return {key: value if key in words else float(value) for key, value in row.items() if value}


def show(console: Console, rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    figures = ["forward", "fwd + bwd", "saved", "defect", "distance", "gradient"]
    table = Table("shape", "start", "library", "method", *figures)
    for r in rows:
        if "error" in r:
            table.add_row(r["shape"], r["start"], r["library"], r["method"], r["error"][:60])
            continue
        cells = [f"{r['forward']:.1f}", f"{r['both']:.1f}", f"{r['saved']:.2f}"]
        cells += ["" if r[k] is None else f"{r[k]:.0e}" for k in ("defect", "distance", "gradient_error")]
        table.add_row(r["shape"], r["start"], r["library"], r["method"], *cells)
    console.print(table)
    table = Table("comparison", "start", "shape", "ratio", "goal", "")
    for c in compared:
        mark = "reached" if c["ratio"] >= c["goal"] else "below"
        table.add_row(c["comparison"], c["start"], c["shape"], f"{c['ratio']:.2f}", f"{c['goal']:g}", mark)
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward of everything at one start, a panel per shape."""
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False)
    colours = {"ours": "#0072B2", "peer": "#D55E00", "torch": "#E69F00", "geotorch": "#999999", "torchlip": "#CC79A7"}
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    for panel, shape in zip(panels.flat, shapes, strict=False):
        here = [r for r in rows if r["shape"] == shape and r["start"] == "kappa-4" and r.get("both", 0) > 0]
        here.sort(key=lambda r: -r["both"])
        names = [f"{r['library']} {r['method'].lower().replace('_', ' ')}" for r in here]
        panel.barh(names, [r["both"] for r in here], color=[colours[r["library"]] for r in here])
        for name, r in zip(names, here, strict=True):
            panel.text(r["both"] * 1.08, name, f"{r['both']:.3g}", va="center", fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(1, max([r["both"] for r in here], default=10) * 3)
        panel.set_title(shape.replace("x", " × "), fontsize=10)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("forward and backward, in pairs of matrix products of that shape", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", help="folder of a library that imports as orthogonium")
    parser.add_argument("--own", action="store_true", help="leave geotorch and deel-torchlip out")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--starts", nargs="+", default=["kappa-4", "kappa-20", "near"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="for one figure in one round, if several calls fit")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="folder for orthogonalizers.csv and .png")
    arguments = parser.parse_args()
    rows = measure(arguments)
    console = Console(width=140)
    console.print(
        f"{platform.machine()}, {arguments.device}, {arguments.dtype}, medians over {arguments.rounds} rounds"
    )
    show(console, rows, ratios(rows))
    if arguments.out:
        plot(save(rows, arguments.out), arguments.out / "orthogonalizers.png")


if __name__ == "__main__":
    main()
