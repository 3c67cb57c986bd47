"""Do the first training steps look the same at every width?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium._randomness import own_randomness
from orthogonium._reports import aligned, without_infinities
from orthogonium.diagnostics._figure import GREY, figure
from orthogonium.diagnostics._observation import check_loss, layers_of, random_direction
from orthogonium.initialization.empirical._trees import arguments_of, rms, signals

# Okabe and Ito's palette, and what tells lines apart when it is used up
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Coordinate:
    """One layer at one width: root mean squares of its outputs at the start, and of how far training moved them."""

    width: int
    layer: str
    start_rms: float
    change_rms: float


@dataclass(frozen=True)
class CoordinateCheck:
    """What :func:`coordinate_check` measured, by layer and width."""

    steps: int
    coordinates: tuple[Coordinate, ...]

    def exponents(self) -> dict[str, float]:
        """By layer, ``p`` in change ∝ widthᵖ, by least squares on logarithms; near zero where widths agree.

        ``nan`` where a change is zero or not finite.
        """
        found: dict[str, float] = {}
        for layer in dict.fromkeys(c.layer for c in self.coordinates):
            points = [c for c in self.coordinates if c.layer == layer]
            usable = all(0 < c.change_rms < math.inf for c in points)
            x = [math.log(c.width) for c in points]
            y = [math.log(c.change_rms) for c in points] if usable else []
            middle = sum(x) / len(x)
            spread = sum((a - middle) ** 2 for a in x)
            slope = sum((a - middle) * b for a, b in zip(x, y, strict=True)) / spread if usable and spread else math.nan
            found[layer] = slope
        return found

    def table(self) -> str:
        """One line per layer: changes by width, and the exponent."""
        widths = list(dict.fromkeys(c.width for c in self.coordinates))
        exponents = self.exponents()
        rows = [("layer", *(str(w) for w in widths), "∝ width^")]
        for layer, exponent in exponents.items():
            by_width = {c.width: c.change_rms for c in self.coordinates if c.layer == layer}
            rows.append((layer, *(f"{by_width[w]:.3g}" if w in by_width else "" for w in widths), f"{exponent:+.2f}"))
        return aligned(rows, right=range(len(rows[0])))

    def __str__(self) -> str:
        return f"Change of outputs after {self.steps} steps (root mean square), by width\n{self.table()}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"exponents": self.exponents()}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; infinite and undefined numbers become ``null``."""
        return json.dumps(without_infinities(self.to_dict()), indent=2)

    def plot(self, path: str | Path) -> None:
        """Draw sizes at the start and changes over width, one line per layer; needs matplotlib."""
        layers = list(self.exponents().items())
        with figure(path, 2, (9.6, 4.2)) as (left, right):
            for number, (layer, exponent) in enumerate(layers):
                points = [c for c in self.coordinates if c.layer == layer]
                widths = [c.width for c in points]
                style: dict[str, Any] = {
                    "color": _COLOURS[number % len(_COLOURS)],
                    "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
                    "marker": "o",
                    "markersize": 4,
                    "label": f"{layer}: {exponent:+.2f}",
                }
                left.plot(widths, [c.start_rms for c in points], **style)
                right.plot(widths, [c.change_rms for c in points], **style)
            for axes, title in ((left, "Outputs at the start"), (right, f"Change after {self.steps} steps")):
                axes.set(title=title, xlabel="width", ylabel="root mean square", xscale="log", yscale="log")
                widths = sorted({c.width for c in self.coordinates})
                axes.set_xticks(widths, [str(w) for w in widths])
                axes.minorticks_off()
                low, high = axes.get_ylim()
                room = max(1.0, (100 * low / high) ** 0.5)  # two decades at least, so that level lines look level
                axes.set_ylim(low / room, high * room)
            legend = right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, title="layer: exponent")
            legend.get_title().set_color(GREY)


def coordinate_check(
    model_fn: Callable[[int], nn.Module],
    widths: Sequence[int],
    batch: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    steps: int = 3,
    seeds: Iterable[int] = (0,),
) -> CoordinateCheck:
    """Train models of several widths for a few steps and compare how far the outputs of each layer move.

    Where the lines of the plot are level, a learning rate found on the narrow model serves the wide one. Where a line
    rises, the wide model diverges first there; where it falls, that layer stops learning.

    Args:
        model_fn: a width to a fresh model; layers are compared by name, so names must not depend on the width.
        widths: at least two.
        batch: the input, the same for every width; a tuple is passed as several arguments, a dict by keyword. Without
            one, 64 Gaussian inputs for models that begin with an ``nn.Linear``.
        loss: the model's output to one number; without one, a fixed random combination of the outputs.
        optimizer: a model to its optimiser; by default ``Adam(lr=1e-3)``. Compare with
            ``lambda model: torch.optim.Adam(layerwise_lr(model, batch, loss))``.
        steps: of training, on the same batch.
        seeds: of the models; sizes are averaged over them as root mean squares.

    Raises:
        TypeError: ``widths`` or ``seeds`` is a single number.
        ValueError: fewer than two widths, no step, no seed, or no batch for a model that does not say its input.
    """
    for name, value in (("widths", widths), ("seeds", seeds)):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list of integers, got {value!r}")
    widths, seeds = list(widths), list(seeds)
    if len(set(widths)) < 2:
        raise ValueError(f"widths must hold at least two different widths, got {widths}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not seeds:
        raise ValueError("seeds must hold at least one seed")
    coordinates = []
    for width in widths:
        squares: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            with own_randomness(seed):
                model = model_fn(width)
                given = _default_batch(model) if batch is None else batch
                for layer, sizes in _train(model, given, loss, optimizer, steps).items():
                    squares.setdefault(layer, []).append(sizes)
        for layer, found in squares.items():
            start, change = (math.sqrt(sum(pair[i] ** 2 for pair in found) / len(found)) for i in (0, 1))
            coordinates.append(Coordinate(width, layer, start, change))
    return CoordinateCheck(steps, tuple(coordinates))


def _train(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None,
    steps: int,
) -> dict[str, tuple[float, float]]:
    """By layer, the size of its outputs before training and of the change after it."""
    args, kwargs = arguments_of(batch)
    engine = torch.optim.Adam(model.parameters(), lr=1e-3) if optimizer is None else optimizer(model)
    before = _outputs(model, args, kwargs)
    for _ in range(steps):
        engine.zero_grad()
        value = (random_direction if loss is None else loss)(model(*args, **kwargs))
        check_loss(value)
        value.backward()
        engine.step()
    after = _outputs(model, args, kwargs)
    return {name: (rms(before[name]), rms(after[name] - before[name])) for name in before}


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The outputs of every layer with parameters, at its last call."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in layers_of(model):
        if next(module.parameters(), None) is None:
            continue

        def keep(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            tensors = signals(output)
            if tensors:
                found[name or "model"] = tensors[0].detach().double().clone()

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad(), own_randomness(seed=0):  # the same dropout before and after
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _default_batch(model: nn.Module) -> Tensor:
    first = next((module for _, module in layers_of(model) if next(module.parameters(), None) is not None), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(
            f"batch is needed: the model begins with {type(first).__name__}, which does not say what its input is like"
        )
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(64, first.in_features, generator=generator)
    return draw.to(next(model.parameters()))
