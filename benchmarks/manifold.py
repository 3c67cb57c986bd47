"""Staying orthogonal without a parametrization: what a step costs, how exact it is, and whether it drifts.

    python benchmarks/manifold.py timing --out docs/benchmarks
    python benchmarks/manifold.py drift --steps 100000 --out docs/benchmarks
    python benchmarks/manifold.py memory --out docs/benchmarks

`timing`: medians of process time over interleaved rounds, one thread, float32; the start is an orthogonal matrix after
a dense step with entries ±1e-3, as Adam takes at its default rate, or one of low rank and spectral norm 0.1. `drift`:
random gradients and steps of fixed size, the largest ‖I − QQᵀ‖₂ met on the way, also in units of the contract
`8 √n eps`. `memory`: how much of a recurrent state is left after 100 steps: the root mean
square of the singular values of ∂s₁₀₀/∂s₀, where the state s is (h, c) for an LSTM and h for the others.
"""

import argparse
import csv
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import orthogonium as og
from orthogonium import linalg
from orthogonium.initialization._filling import Draw
from orthogonium.initialization.recurrent import remember

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LowRankOrthogonal polar": lambda p: og.LowRankOrthogonal(p, lr=0.1, rank=4),
    "RiemannianAdam": lambda p: og.RiemannianAdam(p, lr=0.05),
    "StiefelMuon": lambda p: og.StiefelMuon(p, lr=0.1),
    "RiemannianSGD polar": lambda p: og.RiemannianSGD(p, lr=0.05, momentum=0.9),
    "LowRankOrthogonal geodesic": lambda p: og.LowRankOrthogonal(p, lr=0.1, rank=4, update="geodesic"),
    "RiemannianSGD Cayley": lambda p: og.RiemannianSGD(p, lr=0.05, momentum=0.9, retraction="cayley"),
    "RiemannianSGD geodesic": lambda p: og.RiemannianSGD(p, lr=0.05, momentum=0.9, retraction="geodesic"),
    "LowRankOrthogonal columns": lambda p: og.LowRankOrthogonal(p, lr=0.1, rank=4, sampling="columns"),
    "SGD + keep_orthogonal": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def write(folder: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def by_svd(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def timing(sizes: list[int], rank: int, rounds: int, folder: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    order = random.Random(0)
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        point = linalg.polar(torch.randn(n, n, generator=generator))
        full = 1e-3 * torch.sign(torch.randn(n, n, generator=generator))
        left, right = torch.randn(n, rank, generator=generator), torch.randn(n, rank, generator=generator)
        left *= 0.1 / torch.linalg.matrix_norm(left @ right.mT, 2)
        dense, thin = point + full, point + left @ right.mT
        actions: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
            "SVD": (lambda dense=dense: by_svd(dense), dense),
            "dense polar": (lambda p=point, f=full: linalg.polar_retraction(p, f), dense),
            f"rank {rank} polar": (
                lambda p=point, a=left, b=right: linalg.low_rank_polar_update(p, a, b),
                thin,
            ),
            f"rank {rank} geodesic": (
                lambda p=point, a=left, b=right: linalg.low_rank_geodesic_update(p, a, b),
                thin,
            ),
        }
        samples = defaultdict(list)
        for _ in range(rounds):
            names = list(actions)
            order.shuffle(names)
            for name in names:
                actions[name][0]()  # warm
                for _ in range(1 if name == "SVD" else 3):
                    began = time.process_time()
                    actions[name][0]()
                    samples[name].append(time.process_time() - began)
        reference = median(samples["SVD"])
        for name, (action, moved) in actions.items():
            result = action().double()
            error = torch.linalg.matrix_norm(result - by_svd(moved.double())) / n**0.5
            row = {
                "n": n,
                "method": name,
                "ms": 1e3 * median(samples[name]),
                "times_faster_than_svd": reference / median(samples[name]),
                "error_to_polar": float("nan") if "geodesic" in name else error.item(),
                "defect": linalg.orthogonality_defect(result).item(),
            }
            rows.append(row)
            print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    write(folder, "manifold_timing.csv", rows)


def drift(steps: int, side: int, folder: Path | None, only: str) -> None:
    rows: list[dict[str, Any]] = []
    for name, make in OPTIMIZERS.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        layer = nn.Linear(side, side, bias=False)
        og.orthogonalize_model(layer)
        optimizer = make(layer.parameters())
        if "keep" in name:
            og.keep_orthogonal(layer, optimizer)
        contract = 8 * side**0.5 * torch.finfo(torch.float32).eps
        worst, start, began = 0.0, layer.weight.detach().clone(), time.process_time()
        for step in range(1, steps + 1):
            layer.weight.grad = torch.randn(side, side)
            optimizer.step()
            if step % 50 == 0 or step > steps - 50:
                worst = max(worst, linalg.orthogonality_defect(layer.weight.detach()).item())
        row = {
            "method": name,
            "n": side,
            "steps": steps,
            "worst_defect": worst,
            "share_of_contract": worst / contract,
            "moved": ((layer.weight - start).norm() / start.norm()).item(),
            "ms_per_step": 1e3 * (time.process_time() - began) / steps,
        }
        rows.append(row)
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        write(folder, "manifold_drift.csv", rows)  # after each: it takes minutes


def chrono_(cell: nn.RNNBase, horizon: int) -> None:
    """The biases that :func:`orthogonium.initialize` sets, on weights as they are."""
    remember(cell, horizon, Draw("orthogonal", None))


def stacked_(cell: nn.RNNBase) -> None:
    """One projection of all gates together: what is not meant."""
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if name.startswith("weight"):
                parameter.copy_(linalg.polar(parameter))


def what_is_left(cell: nn.RNNBase, steps: int, inputs: float) -> float:
    width, cell = cell.hidden_size, cell.double()
    x = inputs * torch.randn(steps, 1, cell.input_size, dtype=torch.float64)
    parts = 2 if cell.mode == "LSTM" else 1

    def last(state: Tensor) -> Tensor:
        first = state.view(parts, 1, 1, width)
        _, found = cell(x, (first[0], first[1]) if parts == 2 else first[0])
        return torch.cat([part.flatten() for part in found]) if parts == 2 else found.flatten()

    jacobian = torch.autograd.functional.jacobian(last, torch.zeros(parts * width, dtype=torch.float64))
    assert isinstance(jacobian, Tensor)
    return (jacobian.norm() / (parts * width) ** 0.5).item()


def memory(folder: Path | None, steps: int = 100, width: int = 64, horizon: int = 100) -> None:
    treatments: dict[str, Callable[[nn.RNNBase], object]] = {
        "default": lambda cell: None,
        "stacked gates": stacked_,
        "per gate": og.orthogonalize_model,
        "chrono biases": lambda cell: chrono_(cell, horizon),
        "stacked gates, chrono biases": lambda cell: (stacked_(cell), chrono_(cell, horizon)),
        "per gate, chrono biases": lambda cell: (og.orthogonalize_model(cell), chrono_(cell, horizon)),
    }
    rows = []
    for kind, inputs in ((nn.LSTM, 1.0), (nn.GRU, 1.0), (nn.RNN, 0.0)):
        for name, treat in treatments.items():
            values = []
            for seed in range(3):
                torch.manual_seed(seed)
                cell = kind(16, width)
                treat(cell)
                values.append(what_is_left(cell, steps, inputs))
            rows.append({"layer": kind.__name__, "inputs": inputs, "treatment": name, "rms": median(values)})
            print(f"{kind.__name__:5} {name:30} {median(values):.3g}", flush=True)
    write(folder, "manifold_memory.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost, accuracy and drift of steps on the orthogonal matrices.")
    parser.add_argument("what", choices=["timing", "drift", "memory"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--only", default="", help="part of a method's name")
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "timing":
        timing(arguments.sizes, arguments.rank, arguments.rounds, arguments.out)
    elif arguments.what == "memory":
        memory(arguments.out)
    else:
        drift(arguments.steps, arguments.side, arguments.out, arguments.only)


if __name__ == "__main__":
    main()
