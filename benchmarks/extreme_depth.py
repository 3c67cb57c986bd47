"""Does a plain network of a thousand or ten thousand layers train? Tanh, no normalisation, no residual branch.

    python benchmarks/extreme_depth.py --out docs/benchmarks --plot docs/images/extreme_depth.png

Handwritten digits (8×8, 1,297 to train on and 500 to test on), one thread, momentum SGD of a rate that shrinks with
depth, the same for all starts of a network but for the biases (see ``begin``). Starts: ``initialize(...)`` of this
library; torch's default; ``nn.init.orthogonal_``, which takes kernels for matrices, with torch's gain 5/3 and with 1.
Prints process time, accuracy on the test images, and the size of the first hidden layer's gradient over the last's at
the start. A run ends at the first loss that is not finite.
"""

import argparse
import csv
import json
import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.initialization import with_scaled_ends

# name: (layers, width or channels, steps, batch, learning rate × layers, kind, depth passed to initialize)
# Pixels of an image differ in size and all share one q, so convolutions are asked for more depth: smaller signals.
RUNS = {
    "MLP 1,000 × 32": (1_000, 32, 130, 64, 0.2, "orthogonal", 1_000),
    "CNN 1,000 × 16": (1_000, 16, 75, 32, 0.05, "delta_orthogonal", 20_000_000),
    "MLP 10,000 × 32": (10_000, 32, 36, 64, 0.2, "orthogonal", 10_000),
}
STARTS = ("initialize", "torch default", "orthogonal_ × 5/3", "orthogonal_ × 1")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(N, 64)`` of mean zero and root mean square one, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target)
    images = images - images[:1297].mean(0)
    images = images / images.square().mean(1, keepdim=True).sqrt()
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def build(name: str, depth: int, width: int) -> nn.Sequential:
    """``depth`` layers with weights, the head included."""
    if name.startswith("MLP"):
        layers: list[nn.Module] = [nn.Linear(64, width), nn.Tanh()]
        for _ in range(depth - 2):
            layers += [nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(width, 10))
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 2, stride=2), nn.Tanh()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 10))


def begin(model: nn.Sequential, start: str, depth: int, kind: str) -> tuple[nn.Sequential, float]:
    """The model, and by how much the rate of biases is smaller: they move signals of size ``input_scale``."""
    if start == "initialize":
        report = og.initialize(model, "tanh", kind, depth=depth)
        return with_scaled_ends(model, report), report.input_scale**2
    if start.startswith("orthogonal_"):
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.orthogonal_(module.weight, 5 / 3 if start.endswith("5/3") else 1.0)
                nn.init.zeros_(module.bias)
    return model, 1.0


def gradient_ratio(model: nn.Sequential) -> float:
    """Of the weights of the first layer between hidden features over the last."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    first, last = weights[1].grad, weights[-2].grad
    return float(first.norm() / last.norm())


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(name: str, start: str, seed: int, rate: float | None = None, steps: int | None = None) -> dict:
    depth, width, default_steps, batch, default_rate, kind, isometry = RUNS[name]
    rate, steps = (rate or default_rate) / depth, steps or default_steps
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)
    clock = time.process_time()
    model, bias_rate = begin(build(name, depth, width), start, isometry, kind)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": rate},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": rate * bias_rate},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10) * (1 - t / steps))
    losses, ratio = [], float("nan")
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            ratio = gradient_ratio(model)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
    return {
        "network": name,
        "start": start,
        "steps": len(losses),
        "seconds": time.process_time() - clock,
        "accuracy": accuracy(model, test_images, test_labels),
        "gradient first / last": ratio,
        "losses": losses,
    }


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.9), sharey=True, layout="constrained")
    colours = dict(zip(STARTS, ("#0072B2", "#D55E00", "#CC79A7", "#6b6b6b"), strict=True))
    dashes = dict(zip(STARTS, ("-", "--", "-.", ":"), strict=True))
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        for row in (row for row in rows if row["network"] == name):
            losses = torch.tensor([loss for loss in row["losses"] if math.isfinite(loss)])
            if len(losses) < 5:  # overflowed at once
                axis.plot(
                    [], [], color=colours[row["start"]], linestyle=dashes[row["start"]], label=f"{row['start']}: NaN"
                )
                continue
            window = 5
            smooth = F.avg_pool1d(losses[None, None], window, 1)[0, 0]
            steps = range(window, len(losses) + 1)
            label = f"{row['start']} ({row['accuracy']:.2f})"
            axis.plot(
                steps, smooth, color=colours[row["start"]], linestyle=dashes[row["start"]], linewidth=2, label=label
            )
        axis.set_title(name, loc="left", fontweight="bold", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(0, 3)
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18))
    (axes if len(names) == 1 else axes[0]).set_ylabel("training loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def keep(rows: list[dict], folder: Path) -> list[dict]:
    """Write figures and losses, in place of older ones of the same runs; returns all that the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "extreme_depth.json"
    old = json.loads(kept.read_text()) if kept.exists() else []
    new = {(row["network"], row["start"]) for row in rows}
    rows = [row for row in old if (row["network"], row["start"]) not in new] + rows
    rows.sort(key=lambda row: (list(RUNS).index(row["network"]), STARTS.index(row["start"])))
    rounded = [row | {"losses": [round(loss, 4) for loss in row["losses"]]} for row in rows]
    kept.write_text(json.dumps(rounded) + "\n")
    with (folder / "extreme_depth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "losses"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=list(RUNS), action="append", help="only these networks")
    parser.add_argument("--start", choices=STARTS, action="append", help="only these starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="learning rate × layers")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="folder for extreme_depth.csv and .json (losses; joined over calls)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--redraw", action="store_true", help="plot what --out holds, without training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", og.UnstableVarianceWarning)
    rows = []
    for name in [] if arguments.redraw else arguments.run or RUNS:
        for start in arguments.start or STARTS:
            row = train(name, start, arguments.seed, arguments.rate, arguments.steps)
            rows.append(row)
            shown = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items() if key != "losses"}
            print(shown, f"loss {row['losses'][0]:.3f} -> {sum(row['losses'][-10:]) / 10:.3f}", flush=True)
    if arguments.out:
        rows = keep(rows, arguments.out)
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
