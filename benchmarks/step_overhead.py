"""What the constraint costs a training step: an MLP, a stack of many small layers, and evaluation.

    python benchmarks/step_overhead.py --peer PATH --out docs/benchmarks

Medians of process time (wall time on a GPU) over interleaved rounds; each library in a process of its own. One step
is forward, backward and Adam.
"""

import argparse
import csv
import json
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _contestants import timed
from torch import nn

# name: (width, depth, batch)
MODELS = {"MLP 4x512": (512, 4, 128), "MLP 32x64": (64, 32, 128)}


def build(library: str, preset: str, width: int, depth: int, device: str) -> nn.Module:
    """Square linear layers with ReLU between; the preset ``plain`` is torch's own layer."""
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
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).to(device)


def serve(library: str) -> None:
    """Answer requests, one JSON object a line; models are built once."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one model after the other through the same code
    kept: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = f"{request['model']} {request['preset']}"
        if key not in kept:
            width, depth, batch = MODELS[request["model"]]
            model = build(library, request["preset"], width, depth, request["device"])
            handle = None
            if request["preset"].endswith(" fused"):
                import orthogonium

                handle = orthogonium.fused(model)
            x = torch.randn(batch, width, device=request["device"])
            if request["preset"].endswith(" compiled"):
                model = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
            kept[key] = model, torch.optim.Adam(model.parameters(), lr=1e-3), x, handle
        model, optimizer, x, _ = kept[key]

        def step(model: nn.Module = model, optimizer: Any = optimizer, x: torch.Tensor = x) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        def evaluate(model: nn.Module = model, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        model.train()
        step()
        trained = timed(step, request["device"], request["seconds"])
        model.eval()
        evaluate()
        evaluated = timed(evaluate, request["device"], request["seconds"] / 4)
        print(json.dumps({"step": trained, "evaluation": evaluated}), flush=True)


def main() -> None:
    from orthogonalizers import Worker
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
        todo += [("ours", "MLP 4x512", f"{preset} compiled") for preset in presets if " " not in preset]
    if arguments.peer:
        todo += [("peer", model, preset) for model in MODELS for preset in ("DEFAULT", "CHOLESKY")]
    workers = {
        library: Worker(library, arguments.peer if library == "peer" else None, script=Path(__file__))
        for library in dict.fromkeys(library for library, *_ in todo)
    }
    samples: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    order = random.Random(0)
    for _ in track(range(arguments.rounds), description="rounds", transient=True):
        order.shuffle(todo)
        for library, model, preset in todo:
            request = {"model": model, "preset": preset, "device": arguments.device, "seconds": arguments.seconds}
            samples[(library, model, preset)].append(workers[library].ask(**request))
    rows = []
    for key, replies in sorted(samples.items(), key=lambda item: item[0][::-1]):
        library, model, preset = key
        plain = samples[("ours", model, "plain")]
        row: dict[str, Any] = {"model": model, "library": library, "preset": preset}
        for what in ("step", "evaluation"):
            mine = statistics.median(reply[what] for reply in replies)
            row[f"{what}_ms"] = 1e3 * mine
            row[f"{what}_ratio"] = mine / statistics.median(reply[what] for reply in plain)
        rows.append(row)
    rows.sort(key=lambda row: (row["model"], row["step_ms"]))
    table = Table("model", "library", "preset", "step", "× plain", "evaluation", "× plain")
    for row in rows:
        step, evaluation = f"{row['step_ms']:.2f} ms", f"{row['evaluation_ms']:.3f} ms"
        ratios = f"{row['step_ratio']:.2f}", f"{row['evaluation_ratio']:.2f}"
        table.add_row(row["model"], row["library"], row["preset"], step, ratios[0], evaluation, ratios[1])
    Console(width=120).print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "step_overhead.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ("ours", "peer"):
        serve(sys.argv[1])
    else:
        main()
