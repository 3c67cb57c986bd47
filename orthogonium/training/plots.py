"""Pictures of a run, drawn without a display and in colours that survive colour blindness."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from orthogonium.diagnostics._figure import BLUE as _BLUE
from orthogonium.diagnostics._figure import GREY as _GREY
from orthogonium.diagnostics._figure import ORANGE as _ORANGE
from orthogonium.diagnostics._figure import figure as _figure
from orthogonium.training.layer_spectra import LayerSpectrum
from orthogonium.training.loop import EpochRecord


def plot_certified_accuracy(
    path: Path, radii: Tensor, certified: Tensor, attacked: Mapping[float, float], marked: Sequence[float]
) -> None:
    """Share of images proved safe at each radius, with what an attack leaves standing above it.

    Args:
        path: the PNG to write.
        radii, certified: ``(K,)``, the curve of proofs.
        attacked: accuracy under attack by radius; it may be empty.
        marked: radii whose certified accuracy is written next to the curve.
    """
    with _figure(path, 1, (7.0, 4.4)) as (axes,):
        percent = 100 * certified
        axes.fill_between(radii, 0, percent, color=_BLUE, alpha=0.12, linewidth=0)
        axes.plot(radii, percent, color=_BLUE, label="certified: proved for every perturbation")
        if attacked:
            x = sorted(attacked)
            y = [100 * attacked[r] for r in x]
            axes.plot(x, y, color=_ORANGE, marker="o", markersize=4, label="empirical: correct under the PGD attack")
            between = torch.tensor([float(percent[int((radii <= r).sum()) - 1]) for r in x])
            axes.fill_between(x, between, y, color=_GREY, alpha=0.08, linewidth=0)
        for radius in marked:
            height = float(percent[int((radii <= radius).sum()) - 1])
            axes.plot([radius], [height], "o", color=_BLUE, markersize=6, zorder=5)
            if radius < 0.15:  # under the curve, towards the origin but not over the axis
                shift, side, level = (0, -8), "center", "top"
            elif height > 12:  # lower where the curve is flat, so as to clear the label before
                shift, side, level = (-5, -12 if height > 85 else -5), "right", "top"
            else:
                shift, side, level = (-8, -3), "right", "center"
            axes.annotate(
                f"{height:.1f} %", (radius, height), shift, textcoords="offset points",
                ha=side, va=level, color=_BLUE, fontsize=9,
            )  # fmt: skip
        reached = radii[certified > 0].tolist() + [r for r, share in attacked.items() if share > 0]
        axes.set(xlim=(0, 1.1 * max(reached, default=1.0)), ylim=(0, 101.5))
        axes.set_xlabel("ℓ2 radius of the perturbation (pixels in [0, 1])")
        axes.set_ylabel("images classified correctly (%)")
        axes.set_title("Certified accuracy, and what an attack achieves")
        axes.legend(loc="upper right")


def plot_training(path: Path, history: Sequence[EpochRecord], evaluated_on: str) -> None:
    """Loss and error rate over epochs, the latter on a logarithmic axis."""
    epochs = [record.epoch for record in history]
    with _figure(path, 2, (9.0, 3.8)) as (left, right):
        left.plot(epochs, [record.loss for record in history], color=_BLUE)
        left.set(title="Training loss", xlabel="epoch", ylabel="margin cross-entropy")
        left.set_ylim(bottom=0)
        for name, colour, style, values in (
            ("training, with noise", _BLUE, "-", [record.train_accuracy for record in history]),
            (evaluated_on, _ORANGE, "--", [record.eval_accuracy for record in history]),
        ):
            right.plot(epochs, [100 * (1 - v) for v in values], color=colour, linestyle=style, label=name)
        right.set_yscale("symlog", linthresh=1.0)
        right.set_ylim(0, 100)
        right.set_yticks([0, 0.5, 1, 2, 5, 10, 20, 50, 100], ["0", "0.5", "1", "2", "5", "10", "20", "50", "100"])
        right.set(title="Errors", xlabel="epoch", ylabel="misclassified (%)")
        right.legend(loc="upper right")


def plot_singular_values(path: Path, spectra: Sequence[LayerSpectrum]) -> None:
    """Every singular value of every layer, as its distance from one."""
    deviations = [spectrum.singular_values - 1 for spectrum in spectra]
    largest = max((float(d.abs().max()) for d in deviations if d.numel()), default=0.0)
    unit = torch.finfo(torch.float32).eps
    with _figure(path, 1, (7.0, 4.0)) as (axes,):
        for column, (spectrum, deviation) in enumerate(zip(spectra, deviations, strict=True)):
            spread = torch.linspace(-0.36, 0.36, len(deviation)) if len(deviation) > 1 else torch.zeros(1)
            axes.plot(column + spread, deviation, ".", color=_BLUE, markersize=5)
            axes.annotate(
                f"defect {spectrum.defect:.1e}", (column, 0), (0, 8), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", fontsize=8, color=_GREY,
            )  # fmt: skip
        axes.axhline(0, color=_GREY, linewidth=1)
        for side, label in ((-unit, None), (unit, "± float32 machine epsilon")):
            axes.axhline(side, color=_ORANGE, linewidth=1.2, linestyle="--", label=label)
        axes.legend(loc="upper right")
        limit = 1.6 * max(largest, unit)
        names = [f"{s.path}\n{s.shape[0]} × {s.shape[1]}" for s in spectra]
        axes.set(xlim=(-0.5, len(spectra) - 0.5), ylim=(-limit, limit))
        axes.set_xticks(range(len(spectra)), names)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer, weight (rows × columns)")
        axes.set_ylabel("singular value − 1")
        axes.set_title("Singular values of every weight, largest to smallest")
