"""Which gain keeps a hundred layers alive? Theory beside measurement, for the gains in use and for the critical ones.

    python benchmarks/depth_gains.py --out docs/benchmarks --plots docs/images

A stack of 100 square layers of width 256 without biases, 128 standard Gaussian inputs, weights Gaussian or orthogonal.
Measures the root mean square, over five draws of the weights, of the activations after each layer, and of the gradient
of a random linear function of the last pre-activations at each layer's pre-activations, over that at the last. Theory
is that of infinite width: ``signal_through_depth``. Prints the table of gains too.
"""

import argparse
import csv
import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.initialization import criticality, fixed_point, signal_through_depth

DEPTH, WIDTH, BATCH, DRAWS = 100, 256, 128, 5
# (activation, gain, label)
CASES = [
    ("sigmoid", 1.0, "sigmoid, 1"),
    ("sigmoid", None, "sigmoid, 10.149"),
    ("tanh", 5 / 3, "tanh, 5/3"),
    ("tanh", 1.1, "tanh, 1.1"),
    ("tanh", None, "tanh, 1"),
    ("softsign", None, "softsign, 1"),
    ("relu", None, "relu, √2"),
    ("selu", 0.75, "selu, 3/4"),
    ("selu", None, "selu, 0.690"),
]
FUNCTIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softsign": F.softsign, "relu": F.relu, "selu": F.selu}
TEXT = ("case", "activation", "weights")
PANELS = [["sigmoid"], ["tanh", "softsign"], ["relu", "selu"]]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
NAMES = ("tanh", "sigmoid", "relu", "selu", "softsign", "elu", "gelu", "silu", "mish", "hardtanh")


def measure(activation: str, sigma_w: float, weights: str) -> tuple[Tensor, Tensor]:
    """RMS of activations and of gradients per layer over all draws, in float64 so that nothing underflows."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(DEPTH))
    generator = torch.Generator().manual_seed(0)
    runs = [one_draw(layers, activation, sigma_w, weights, generator) for _ in range(DRAWS)]
    activations, gradients = (torch.stack(kind).square().mean(0).sqrt() for kind in zip(*runs, strict=True))
    return activations, gradients


def one_draw(
    layers: nn.ModuleList, activation: str, sigma_w: float, weights: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    og.initialize(layers, activation, weights, gain=sigma_w, generator=generator)
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    hidden, activations = [], []
    for layer in layers:
        hidden.append(layer(x))
        hidden[-1].retain_grad()
        x = FUNCTIONS[activation](hidden[-1])
        activations.append(x)
    direction = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    (hidden[-1] * direction).sum().backward()
    gradients = torch.stack([h.grad.square().mean().sqrt() for h in hidden])
    return torch.stack([a.detach().square().mean().sqrt() for a in activations]), gradients / gradients[-1]


def experiment() -> list[dict]:
    rows = []
    for activation, chosen, label in CASES:
        sigma_w = criticality(activation).sigma_w if chosen is None else chosen
        theory = signal_through_depth(activation, sigma_w, depth=DEPTH, q=sigma_w**2)  # inputs of variance one
        for weights in ("gaussian", "orthogonal"):
            activations, gradients = measure(activation, sigma_w, weights)
            for layer in range(DEPTH):
                rows.append(
                    {
                        "case": label,
                        "activation": activation,
                        "weights": weights,
                        "layer": layer + 1,
                        "activation_rms": float(activations[layer]),
                        "activation_theory": float(theory.activation_rms[layer]),
                        "gradient_rms": float(gradients[layer]),
                        "gradient_theory": float(theory.gradient_rms[layer]),
                    }
                )
    return rows


def print_experiment(rows: list[dict]) -> None:
    print("\n| activation, gain | std at layer 100: theory | Gaussian | orthogonal | gradient at layer 1 over ", end="")
    print("layer 100: theory | Gaussian | orthogonal |\n| --- | --- | --- | --- | --- | --- | --- |")
    for _, _, label in CASES:
        ends = {(row["weights"], row["layer"]): row for row in rows if row["case"] == label}
        last = [ends[("gaussian", DEPTH)]["activation_theory"]]
        last += [ends[(w, DEPTH)]["activation_rms"] for w in ("gaussian", "orthogonal")]
        first = [ends[("gaussian", 1)]["gradient_theory"]]
        first += [ends[(w, 1)]["gradient_rms"] for w in ("gaussian", "orthogonal")]
        print(f"| {label} | " + " | ".join(f"{value:.3g}" for value in (*last, *first)) + " |")


def print_table() -> None:
    """The gains, with what torch recommends beside them."""
    print("| activation | torch's gain | χ there | critical | variance | gradient | centred | Lipschitz | stability |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in NAMES:
        try:
            torchs = nn.init.calculate_gain(name)
            there = f"{torchs:.6g} | {fixed_point(name, torchs).chi:.4f}"
        except ValueError:
            there = "none | "
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", og.UnstableVarianceWarning)
            point = criticality(name)
        rest = [og.gain(name, criterion=c) for c in ("variance", "gradient", "centred", "lipschitz")]
        figures = " | ".join(f"{value:.6f}" for value in (point.sigma_w, *rest))
        print(f"| {name} | {there} | {figures} | {point.stability} |")
    for depth in (10, 100, 1_000, 10_000):
        point = criticality("tanh", depth)
        print(f"tanh, {depth} layers: σ_w {point.sigma_w:.6f}, σ_b {point.sigma_b:.6f}, √q {math.sqrt(point.q):.6f}")


def draw(rows: list[dict], quantity: str, title: str, path: Path) -> None:
    """A panel per group of activations (rows) and kind of weights (columns); lines are theory, dots measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(9, 8.4), sharex=True, sharey="row", layout="constrained")
    for panel, activations in zip(axes, PANELS, strict=True):
        for axis, weights in zip(panel, ("gaussian", "orthogonal"), strict=True):
            shown = [row for row in rows if row["activation"] in activations and row["weights"] == weights]
            for label, colour in zip(dict.fromkeys(row["case"] for row in shown), COLOURS, strict=False):
                mine = [row for row in shown if row["case"] == label]
                layers = [row["layer"] for row in mine]
                axis.plot(layers, [row[f"{quantity}_theory"] for row in mine], color=colour, linewidth=1.5)
                dots = mine[::4]
                heights = [row[f"{quantity}_rms"] for row in dots]
                axis.plot([row["layer"] for row in dots], heights, "o", color=colour, markersize=3.5, label=label)
            if (quantity, activations) == ("activation", ["sigmoid"]):
                axis.set_ylim(0, 1)
            else:
                axis.set_yscale("log")
            axis.grid(color="#e4e4e4")
            axis.spines[["top", "right"]].set_visible(False)
        panel[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        panel[0].set_ylabel("root mean square")
    axes[0][0].set_title(f"{title}: Gaussian weights", loc="left", fontsize=10, fontweight="bold")
    axes[0][1].set_title("orthogonal weights", loc="left", fontsize=10, fontweight="bold")
    for axis in axes[-1]:
        axis.set_xlabel("layer (line: theory; dots: measured)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_both(rows: list[dict], folder: Path) -> None:
    draw(rows, "activation", "Activations", folder / "gains_activations.png")
    draw(rows, "gradient", "Gradients", folder / "gains_gradients.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for depth_gains.csv")
    parser.add_argument("--redraw", action="store_true", help="plot depth_gains.csv again, without measuring")
    parser.add_argument("--plots", type=Path, help="folder for the two pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.redraw:
        with (arguments.out / "depth_gains.csv").open() as file:
            rows = [{k: v if k in TEXT else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        draw_both(rows, arguments.plots)
        return
    print_table()
    clock = time.process_time()
    rows = experiment()
    print_experiment(rows)
    print(f"\n{time.process_time() - clock:.0f} s of process time")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "depth_gains.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if arguments.plots:
        draw_both(rows, arguments.plots)


if __name__ == "__main__":
    main()
