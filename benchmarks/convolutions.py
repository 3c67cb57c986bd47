"""What do orthogonal convolutions cost? The weight alone, and a training step and an evaluation of a small CNN.

    python benchmarks/convolutions.py --peer PATH --out docs/benchmarks

Against plain ``nn.Conv2d`` with circular padding and free weights, and against another library that imports as
``orthogonium``, which runs in a process of its own. Rounds alternate between the contestants in blocks of at least 10
milliseconds; times are medians over blocks, of process time on one thread of a CPU and of wall time on a GPU. Ratios
are medians over rounds of the ratio within a round, since the speed of a shared machine drifts.
"""

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _workers import Worker
from torch import nn

# (in, out, kernel, stride)
SHAPES = [
    (32, 32, 3, 1),
    (64, 64, 3, 1),
    (128, 128, 3, 1),
    (128, 128, 5, 1),
    (64, 64, 3, 2),
    (64, 128, 3, 2),
    (128, 128, 3, 2),
]
PRESETS = ["DEFAULT", "CHOLESKY", "QR"]
# (channels in, out, stride) of the CNN's 3x3 convolutions, on 32x32 images
STAGES = [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
BLOCK_MS = 10.0
GOALS = {"DEFAULT": 5.0, "CHOLESKY": 3.3, "QR": 3.3, "strided": 4.0}
STEP_GOALS = {("step", 64): 1.10, ("step", 16): 1.25, ("evaluation", 64): 1.05, ("evaluation", 16): 1.05}


def make_conv(library: str, preset: str, inner: int, outer: int, k: int, stride: int) -> nn.Module:
    if library == "plain":
        return nn.Conv2d(inner, outer, k, stride, padding=k // 2, padding_mode="circular")
    import orthogonium.reparametrizers as front

    params = getattr(front, f"{preset}_ORTHO_PARAMS")
    if library == "peer":
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d

        padding = k // 2 if stride > 1 else "same"
        return AdaptiveOrthoConv2d(inner, outer, k, stride=stride, padding=padding, ortho_params=params)
    from orthogonium import OrthoConv2d

    return OrthoConv2d(inner, outer, k, stride=stride, ortho_params=params)


class Halves(nn.Module):
    """The larger and the smaller of channels half the width apart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat((torch.maximum(first, second), torch.minimum(first, second)), 1)


def make_cnn(library: str, preset: str) -> nn.Module:
    stages: list[nn.Module] = []
    for inner, outer, stride in STAGES:
        stages += [make_conv(library, preset, inner, outer, 3, stride), Halves()]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(STAGES[-1][1], 10))


class Contestant:
    """Answers one request a line; keeps what it has made."""

    def __init__(self, library: str, device: str) -> None:
        self.library, self.device = library, torch.device(device)
        self.kept: dict[str, Any] = {}
        self.repeats: dict[str, int] = {}
        torch.set_num_threads(1)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        library = request.get("library", self.library)
        key = json.dumps(request, sort_keys=True)
        if key not in self.kept:
            torch.manual_seed(0)
            self.kept[key] = self.prepare(library, request)
            run = self.kept[key]
            for _ in range(3):
                run()
            least = min(self.seconds(run, 1) for _ in range(3))
            self.repeats[key] = max(1, math.ceil(BLOCK_MS / (1e3 * least)))
        return {"ms": 1e3 * self.seconds(self.kept[key], self.repeats[key])}

    def seconds(self, run: Callable[[], None], repeats: int) -> float:
        begin = self.clock()
        for _ in range(repeats):
            run()
        return (self.clock() - begin) / repeats

    def prepare(self, library: str, request: dict[str, Any]) -> Any:
        if request["kind"] == "weight":
            layer = make_conv(library, request["preset"], *request["shape"]).to(self.device).train()
            if "save" in request:
                torch.save(layer.weight.detach().cpu(), request["save"])
            direction = torch.randn_like(layer.weight)
            parameters = [p for name, p in layer.named_parameters() if name != "bias" and p.requires_grad]

            def weight() -> None:
                torch.autograd.grad(layer.weight, parameters, direction)

            return weight
        model = make_cnn(library, request["preset"]).to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x = torch.randn(request["batch"], 3, 32, 32, device=self.device)
        y = torch.arange(request["batch"], device=self.device) % 10

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        def evaluate() -> None:
            with torch.no_grad():
                model(x)

        if request["kind"] == "evaluation":
            model.eval()
            return evaluate
        return step


def serve(library: str, device: str) -> None:
    contestant = Contestant(library, device)
    for line in sys.stdin:
        print(json.dumps(contestant.answer(json.loads(line))), flush=True)


def measure(entries: list[tuple[Worker, dict[str, Any]]], rounds: int) -> tuple[list[float], list[list[float]]]:
    """Medians of the contestants' times, and all of them, a list per contestant."""
    for worker, request in entries:  # make and warm up
        worker.ask(**request)
    rows = [[worker.ask(**request)["ms"] for worker, request in entries] for _ in range(rounds)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [median(column) for column in columns], columns


def ratio(over: list[float], under: list[float]) -> float:
    return median(a / b for a, b in zip(over, under, strict=True))


def defect(path: str, stride: int) -> float:
    """The largest distance of a singular value from one, on 8x8 images."""
    from orthogonium.linalg.kernel_spectrum import circular_singular_values

    values = circular_singular_values(torch.load(path), (8, 8), (stride, stride), (1, 1))
    return float((values - 1).abs().max())


def weights(ours: Worker, peer: Worker | None, rounds: int) -> list[dict[str, Any]]:
    print(
        f"{'weight, forward + backward':<28}{'preset':<10}{'ours ms':>9}{'peer ms':>9}"
        f"{'ratio':>7}{'goal':>6}{'defect':>10}{'peer’s':>10}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            for preset in PRESETS:
                request: dict[str, Any] = {"kind": "weight", "shape": shape, "preset": preset}
                entries = [(ours, request | {"save": f"{folder}/ours.pt"})]
                if peer is not None:
                    entries.append((peer, request | {"save": f"{folder}/peer.pt"}))
                found, columns = measure(entries, rounds)
                inner, outer, k, s = shape
                row: dict[str, Any] = {"kind": "weight", "case": f"{inner} -> {outer}, k {k}, stride {s}"}
                row |= {"preset": preset, "ms": found[0], "defect": defect(f"{folder}/ours.pt", s)}
                line = f"{row['case']:<28}{preset:<10}{found[0]:9.2f}"
                if peer is not None:
                    goal = GOALS["strided"] if s > 1 and preset == "DEFAULT" else GOALS[preset]
                    row |= {"peer_ms": found[1], "ratio": ratio(columns[1], columns[0]), "goal": goal}
                    row["peer_defect"] = defect(f"{folder}/peer.pt", s)
                    line += f"{found[1]:9.2f}{row['ratio']:7.2f}{goal:6.1f}"
                else:
                    line += f"{'–':>9}{'–':>7}{'–':>6}"
                line += f"{row['defect']:10.1e}"
                print(line + (f"{row['peer_defect']:10.1e}" if peer is not None else ""), flush=True)
                rows.append(row)
    return rows


def steps(ours: Worker, peer: Worker | None, rounds: int) -> list[dict[str, Any]]:
    """Times of a training step and of an evaluation; here ``ratio`` is that to the plain CNN."""
    print(f"\n{'CNN':<22}{'contestant':<18}{'ms':>9}{'/ plain':>9}{'goal':>6}")
    rows = []
    for kind, batch in STEP_GOALS:
        request = {"kind": kind, "batch": batch}
        entries = [(ours, request | {"library": "plain", "preset": ""})]
        names = ["plain"]
        for preset in ("DEFAULT", "CHOLESKY"):
            entries.append((ours, request | {"preset": preset}))
            names.append(f"ours {preset}")
        if peer is not None:
            entries.append((peer, request | {"preset": "DEFAULT"}))
            names.append("peer DEFAULT")
        found, columns = measure(entries, rounds)
        for name, value, column in zip(names, found, columns, strict=True):
            goal = STEP_GOALS[kind, batch] if name.startswith("ours") else ""
            row = {"kind": kind, "case": f"batch {batch}", "preset": name, "ms": value, "goal": goal}
            rows.append(row | {"ratio": ratio(column, columns[0])})
            end = f"{goal:6.2f}" if goal else ""
            print(f"{kind + ', ' + row['case']:<22}{name:<18}{value:9.2f}{rows[-1]['ratio']:9.3f}{end}", flush=True)
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    fields = ["kind", "case", "preset", "ms", "peer_ms", "ratio", "goal", "defect", "peer_defect"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder with the other library")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for convolutions.csv")
    parser.add_argument("--only", choices=["weights", "steps"])
    parser.add_argument("--serve", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.device)
        return 0
    script = Path(__file__).resolve()
    arguments = ("--device", options.device, "--serve")
    ours = Worker(script, *arguments, "ours")
    peer = Worker(script, *arguments, "peer", library=options.peer) if options.peer else None
    rows = []
    if options.only != "steps":
        rows += weights(ours, peer, options.rounds)
    if options.only != "weights":
        rows += steps(ours, peer, options.rounds)
    if options.out:
        write(rows, options.out / "convolutions.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
