"""Networks that train only while their weights stay orthogonal: a tanh network of depth 200, and copying by an RNN.

    python benchmarks/deep_training.py depth --out docs/benchmarks
    python benchmarks/deep_training.py copy --out docs/benchmarks
    python benchmarks/deep_training.py plot --out docs/benchmarks --images docs/images

`depth`: handwritten digits (scikit-learn), a quarter held out, gain 1 (critical for tanh), the signal scaled into the
range where tanh stays critical. `copy`: remember ten of eight symbols over a gap of 100 steps; a network that forgets
cannot do better than guessing, ln 8 nats per symbol to be recalled. Same data, batches and learning-rate grid for every
contestant: each is run with every rate of the grid, and its best run is shown.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthogonium as og

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


class DeepTanh(nn.Module):
    """``depth`` square tanh layers. ``√q`` is the signal's size: small enough that depth does not saturate it."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int, q: float) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.body = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)
        self.scale = q**0.5

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.scale * self.first(x))
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x / self.scale)


class Copier(nn.Module):
    """A plain tanh RNN that reads symbols and answers at each step."""

    def __init__(self, symbols: int, width: int, q: float) -> None:
        super().__init__()
        self.rnn = nn.RNN(symbols + 2, width, batch_first=True)
        self.head = nn.Linear(width, symbols)
        self.scale = q**0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.scale * x)[0] / self.scale)


def zero_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)


def plain(optimizer: Callable[..., torch.optim.Optimizer]) -> Make:
    return lambda model, lr: optimizer(model.parameters(), lr=lr)


def started(optimizer: Callable[..., torch.optim.Optimizer], include: str) -> Make:
    """Orthogonal at the start, free from then on."""

    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        og.orthogonalize_model(model, include=include)
        return optimizer(model.parameters(), lr=lr)

    return make


def kept(optimizer: Callable[..., torch.optim.Optimizer], include: str) -> Make:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        made = optimizer(model.parameters(), lr=lr)
        og.keep_orthogonal(model, made, include=include)
        return made

    return make


def on_manifold(optimizer: Callable[..., torch.optim.Optimizer], include: str, **options: Any) -> Make:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        og.orthogonalize_model(model, include=include)
        return optimizer(og.parameter_groups(model, 0.0, manifold=include), lr=lr, **options)

    return make


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = (x - x.mean(0)) / (x.std(0) + 0.1)
    y = torch.tensor(data.target)
    train, test = train_test_split(range(len(y)), test_size=0.25, stratify=y.numpy(), random_state=0)
    return x[train], y[train], x[test], y[test]


def run_depth(make: Make, lr: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    x, y, test_x, test_y = digits()
    torch.manual_seed(arguments.seed)
    model = DeepTanh(64, arguments.width, arguments.depth, 10, q=1 / arguments.depth)
    zero_biases(model)
    optimizer = make(model, lr)
    order = torch.Generator().manual_seed(arguments.seed)
    rows: list[dict[str, Any]] = []
    began = time.process_time()
    for epoch in range(arguments.epochs + 1):
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
            loss = F.cross_entropy(model(x), y).item()
        rows.append({"x": epoch, "loss": loss, "score": accuracy, "seconds": time.process_time() - began})
        if not math.isfinite(loss) or epoch == arguments.epochs:
            break
        for batch in torch.randperm(len(y), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return rows


def copy_batch(count: int, gap: int, items: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One-hot input of ``items`` symbols, blanks, a mark, blanks; and the symbols."""
    words = torch.randint(0, symbols, (count, items), generator=generator)
    blank, mark = symbols, symbols + 1
    line = torch.full((count, 2 * items + gap), blank)
    line[:, :items] = words
    line[:, items + gap - 1] = mark
    return F.one_hot(line, symbols + 2).float(), words


def run_copy(make: Make, lr: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    items, symbols = 10, 8
    torch.manual_seed(arguments.seed)
    model = Copier(symbols, arguments.hidden, q=0.01)
    zero_biases(model)
    optimizer = make(model, lr)
    generator = torch.Generator().manual_seed(arguments.seed)
    rows: list[dict[str, Any]] = []
    total, right, began = 0.0, 0.0, time.process_time()
    for step in range(1, arguments.steps + 1):
        x, words = copy_batch(64, arguments.gap, items, symbols, generator)
        answers = model(x)[:, -items:]
        loss = F.cross_entropy(answers.flatten(0, 1), words.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total, right = total + loss.item() / 20, right + (answers.argmax(-1) == words).float().mean().item() / 20
        if step % 20 == 0:
            rows.append({"x": step, "loss": total, "score": right, "seconds": time.process_time() - began})
            if not math.isfinite(total):
                break
            total, right = 0.0, 0.0
    return rows


BODY, LOOP = "body.*.weight", "rnn.weight_hh_l0"
RATES = (3e-4, 1e-3, 3e-3)
SGD_RATES = (1e-3, 3e-3, 1e-2, 1e-1)
DEPTH_RATES, DEPTH_SGD_RATES = (1e-4, 3e-4, 1e-3), (1e-3, 1e-2)
DEPTH: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD": (plain(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)), DEPTH_SGD_RATES),
    "Adam": (plain(torch.optim.Adam), DEPTH_RATES),
    "Adam, orthogonal start": (started(torch.optim.Adam, "[fb]*.weight"), DEPTH_RATES),
    "SGD + keep_orthogonal": (
        kept(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), "[fb]*.weight"),
        DEPTH_SGD_RATES,
    ),
    "Adam + keep_orthogonal": (kept(torch.optim.Adam, "[fb]*.weight"), DEPTH_RATES),
    "LowRankOrthogonal, rank 4": (on_manifold(og.LowRankOrthogonal, BODY, rank=4), DEPTH_RATES),
    "RiemannianAdam": (on_manifold(og.RiemannianAdam, BODY), DEPTH_RATES),
}
COPY: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD": (plain(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)), SGD_RATES),
    "Adam": (plain(torch.optim.Adam), RATES),
    "Adam, orthogonal start": (started(torch.optim.Adam, LOOP), RATES),
    "Adam + keep_orthogonal": (kept(torch.optim.Adam, LOOP), RATES),
    "LowRankOrthogonal, rank 4": (on_manifold(og.LowRankOrthogonal, LOOP, rank=4), RATES),
    "RiemannianAdam": (on_manifold(og.RiemannianAdam, LOOP), RATES),
}


def contest(task: str, arguments: argparse.Namespace) -> None:
    run, table = (run_depth, DEPTH) if task == "depth" else (run_copy, COPY)
    rows: list[dict[str, Any]] = []
    for name, (make, rates) in table.items():
        if arguments.only and arguments.only not in name:
            continue
        for lr in arguments.rates or rates:
            found = run(make, lr, arguments)
            rows += [{"method": name, "lr": lr, **row} for row in found]
            last = found[-1]
            print(
                f"{name:28} lr {lr:<8g} loss {last['loss']:.3f} score {last['score']:.3f} {last['seconds']:.0f} s",
                flush=True,
            )
        if arguments.out:  # after each method: they take minutes
            arguments.out.mkdir(parents=True, exist_ok=True)
            with (arguments.out / f"training_{task}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def best_runs(path: Path) -> dict[str, list[dict[str, float]]]:
    """For each method the run whose last score is highest."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            values = {key: float(row[key]) for key in ("x", "loss", "score", "seconds", "lr")}
            runs.setdefault((row["method"], row["lr"]), []).append(values)
    best: dict[str, list[dict[str, float]]] = {}
    for (method, _), rows in runs.items():
        if method not in best or rows[-1]["score"] > best[method][-1]["score"]:
            best[method] = rows
    return best


def plot(folder: Path, images: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {
        "SGD": "#aaaaaa",
        "Adam, orthogonal start": "#cc79a7",
        "Adam": "#555555",
        "SGD + keep_orthogonal": "#56b4e9",
        "Adam + keep_orthogonal": "#0072b2",
        "LowRankOrthogonal, rank 4": "#d55e00",
        "RiemannianAdam": "#009e73",
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    panels = (
        ("depth", "score", "epoch", "test accuracy", "digits, tanh network of depth 200", 0.1, "guessing"),
        (
            "copy",
            "loss",
            "step",
            "nats per symbol",
            "copy ten symbols over 100 steps, tanh RNN",
            math.log(8),
            "guessing",
        ),
    )
    for axis, (task, key, x_label, y_label, title, chance, said) in zip(axes, panels, strict=True):
        for method, rows in best_runs(folder / f"training_{task}.csv").items():
            style = "--" if method in ("SGD", "Adam") else "-"
            label = f"{method}, lr {rows[0]['lr']:g}"
            axis.plot([r["x"] for r in rows], [r[key] for r in rows], style, color=colors[method], label=label)
        axis.axhline(chance, color="black", lw=0.8, ls=":")
        axis.annotate(said, (0.98, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axis.set(xlabel=x_label, ylabel=y_label, title=title)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / "deep_training.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training curves with and without orthogonal weights.")
    parser.add_argument("task", choices=["depth", "copy", "plot"])
    parser.add_argument("--depth", type=int, default=200)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--gap", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of a method's name")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of the grid")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.task == "plot":
        plot(arguments.out, arguments.images)
    else:
        contest(arguments.task, arguments)


if __name__ == "__main__":
    main()
