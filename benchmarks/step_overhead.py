"""What the constraint costs a training step: an MLP, a stack of many small layers, and evaluation.

    python benchmarks/step_overhead.py --peer PATH --compile --out docs/benchmarks

Medians of process time (wall time on a GPU) over rounds in a random order; each library in a process of its own. One
step is forward, backward and Adam. A ratio compares calls that took turns in the same second, with ``nn.Linear`` (and,
for compiled models, with the same model not compiled). ``--compile`` adds every preset compiled, and evaluation of
other batch sizes and of MaxMin networks.
"""

import argparse
import csv
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _contestants import timed_beside
from torch import nn


class Model(NamedTuple):
    """Square linear layers with an activation between, and what is measured of them."""

    width: int
    depth: int
    batch: int
    activation: str = "ReLU"
    measured: tuple[str, ...] = ("step", "evaluation")


MODELS = {"MLP 4x512": Model(512, 4, 128), "MLP 32x64": Model(64, 32, 128)}
EVALUATED = {
    f"MLP 4x512 {activation} {batch}": Model(512, 4, batch, activation, ("evaluation",))
    for activation in ("ReLU", "MaxMin")
    for batch in (1, 8, 32, 128, 512)
}


def build(library: str, preset: str, model: Model, device: str) -> nn.Module:
    """The preset ``plain`` is torch's own layer."""
    width, depth = model.width, model.depth
    torch.manual_seed(0)
    if preset.startswith("plain"):
        layers = [nn.Linear(width, width) for _ in range(depth)]
    else:
        import orthogonium.reparametrizers as front

        params = getattr(front, f"{preset.split()[0]}_ORTHO_PARAMS")
        if library == "ours":
            import orthogonium

            layers = [orthogonium.OrthoLinear(width, width, ortho_params=params) for _ in range(depth)]
        else:
            from orthogonium.layers.linear import OrthoLinear

            layers = [OrthoLinear(width, width, ortho_params=params) for _ in range(depth)]
    parts: list[nn.Module] = []
    for layer in layers:
        parts += [layer, activation(model.activation)]
    return nn.Sequential(*parts[:-1]).to(device)


def activation(name: str) -> nn.Module:
    if name == "ReLU":
        return nn.ReLU()
    import orthogonium

    found: nn.Module = getattr(orthogonium, name)()
    return found


def prepared(library: str, name: str, preset: str, device: str) -> dict[str, Callable[[], None]]:
    """A training step and an evaluation of one model."""
    described = (MODELS | EVALUATED)[name]
    model = build(library, preset, described, device)
    if preset.endswith(" fused"):
        import orthogonium

        orthogonium.fused(model)
    if preset.endswith(" compiled"):
        # each for its own batch size: one model after the other runs through the same code
        model = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    x = torch.randn(described.batch, described.width, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        if not model.training:
            model.train()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def evaluate() -> None:
        if model.training:
            model.eval()
        with torch.no_grad():
            model(x)

    actions = {"step": step, "evaluation": evaluate}
    chosen = {what: actions[what] for what in described.measured}
    for action in chosen.values():  # compiles, and fills caches
        action()
        action()
    return chosen


def serve(library: str) -> None:
    """One JSON object a line: seconds of a preset, of a plain model, and of the preset not compiled."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 128
    make = cache(prepared)
    for line in sys.stdin:
        request = json.loads(line)
        preset, device = request["preset"], request["device"]
        beside = dict.fromkeys([preset, "plain", preset.removesuffix(" compiled")])
        models = [make(library, request["model"], name, device) for name in beside]
        reply: dict[str, list[float]] = {}
        for what in models[0]:
            share = 1.0 if what == "step" else 0.5
            reply[what] = timed_beside([model[what] for model in models], device, share * request["seconds"])
        print(json.dumps(reply), flush=True)


def main() -> None:
    from _workers import Worker
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Cost of a constrained training step.")
    parser.add_argument("--peer", help="folder of a library that imports as orthogonium")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="for one training figure in one round")
    parser.add_argument("--compile", action="store_true", help="also every preset under torch.compile(fullgraph=True)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for step_overhead.csv")
    arguments = parser.parse_args()
    presets = ["plain", "POLAR", "POLAR fused", "DEFAULT", "CHOLESKY", "CHOLESKY fused", "QR", "EXP", "CAYLEY"]
    todo = [("ours", model, preset) for model in MODELS for preset in presets]
    if arguments.compile:
        todo += [("ours", model, f"{preset} compiled") for model in MODELS for preset in presets if " " not in preset]
        todo += [("ours", model, preset) for model in EVALUATED for preset in ("plain compiled", "DEFAULT compiled")]
    if arguments.peer:
        todo += [("peer", model, preset) for model in MODELS for preset in ("DEFAULT", "CHOLESKY")]
    workers = {
        library: Worker(Path(__file__).resolve(), library, library=arguments.peer if library == "peer" else None)
        for library in dict.fromkeys(library for library, *_ in todo)
    }
    samples: dict[tuple[str, ...], list[dict[str, list[float]]]] = defaultdict(list)
    order = random.Random(0)
    for _ in track(range(arguments.rounds), description="rounds", transient=True):
        order.shuffle(todo)
        for library, model, preset in todo:
            request = {"model": model, "preset": preset, "device": arguments.device, "seconds": arguments.seconds}
            samples[(library, model, preset)].append(workers[library].ask(**request))
    rows = []
    for (library, model, preset), replies in samples.items():
        row: dict[str, Any] = {"model": model, "library": library, "preset": preset}
        for what in replies[0]:
            median = [statistics.median(column) for column in zip(*(reply[what] for reply in replies), strict=True)]
            ratios = [reply[what][0] / reply[what][min(1, len(reply[what]) - 1)] for reply in replies]
            row[f"{what}_ms"], row[f"{what}_ratio"] = 1e3 * median[0], statistics.median(ratios)
            eager = [reply[what][0] / reply[what][-1] for reply in replies] if preset.endswith(" compiled") else []
            row[f"{what}_to_eager"] = statistics.median(eager) if eager else ""
        rows.append(row)
    rows.sort(key=lambda row: (list(MODELS | EVALUATED).index(row["model"]), row.get("step_ms", row["evaluation_ms"])))
    table = Table("model", "library", "preset", "step", "× plain", "× eager", "evaluation", "× plain", "× eager")
    for row in rows:
        cells = [row["model"], row["library"], row["preset"]]
        for what in ("step", "evaluation"):
            if f"{what}_ms" not in row:
                cells += ["", "", ""]
                continue
            eager = row[f"{what}_to_eager"]
            cells += [f"{row[f'{what}_ms']:.2f} ms", f"{row[f'{what}_ratio']:.2f}", f"{eager:.2f}" if eager else ""]
        table.add_row(*cells)
    Console(width=120).print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "step_overhead.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, max(map(list, rows), key=len))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ("ours", "peer"):
        serve(sys.argv[1])
    else:
        main()
