"""What is known about one wrapped module while it is being tuned."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.initialization.empirical._trees import signals
from orthogonium.initialization.empirical._updates import Call, moved_outputs
from orthogonium.initialization.empirical.normed import Normed, is_scaled
from orthogonium.initialization.empirical.report import ModuleScales

_CLOSE = 0.05  # |log| of the mean size over calls at which a shared scale is good enough


class Record:
    """Sizes seen in one run, and the scales that follow from them.

    Every call is scaled to one by a factor of its own in the first run, and by the shared one afterwards.

    Args:
        module: whose record this is.
        scales: a wrapper whose scales apply and stay; otherwise they are to be found.
    """

    def __init__(self, module: nn.Module, scales: Normed | None = None) -> None:
        self.module, self.fixed = module, scales is not None
        self.order = 1 << 62  # position among first calls
        self.calls: list[Call] = []
        self.activation: list[float] = [] if scales is None else scales.activation_scale.tolist()
        self.gradient: list[float] = [] if scales is None else scales.gradient_scale.tolist()
        self.update = 1.0 if scales is None else float(scales.update_scale)
        self.update_rms: float | None = None
        self._seen_activation: dict[tuple[int, int], float] = {}  # by call and output: size without the factor
        self._seen_gradient: dict[tuple[int, int], float] = {}
        self._attenuation = 1.0
        self._trail: dict[str, tuple[float, float]] = {}

    def attenuation(self, args: Any, kwargs: Any) -> float:
        """A factor on the gradients of the parameters that keeps half-precision sums over a batch from overflowing."""
        if not self.calls:
            half = [t.numel() for t in signals((args, kwargs)) if t.dtype.itemsize < 4]
            self._attenuation = max(half) ** -0.5 if half else 1.0
        return self._attenuation

    def forget(self) -> None:
        """What the run before saw, not the scales chosen from it."""
        self.calls.clear()
        self._seen_activation.clear()
        self._seen_gradient.clear()

    def begin(self, call: Call) -> int:
        self.calls.append(call)
        return len(self.calls) - 1

    def see_activation(self, call: int, number: int, size: float) -> float:
        """Note the size of an output; the factor to apply."""
        self._seen_activation[call, number] = size
        return _pick(self.activation, number) if self.activation else _inverse(size)

    def see_gradient(self, call: int, number: int, size: float) -> float:
        self._seen_gradient[call, number] = size
        return _pick(self.gradient, number) if self.gradient else _inverse(size)

    def gradients_of(self, call: int) -> bool:
        return any(index == call for index, _ in self._seen_gradient)

    def settle(self) -> bool:
        """Choose shared scales from what was seen; whether another run is not needed for this module."""
        reused = len(self.calls) > 1
        if not self.calls:
            self.activation, self.gradient = [1.0], [1.0]
            return True
        first = not self.activation
        close = True
        for what, seen in (("activation", self._seen_activation), ("gradient", self._seen_gradient)):
            outputs = 1 + max((number for _, number in self._seen_activation), default=0)
            present: list[float] = getattr(self, what)
            chosen = []
            for number in range(outputs):
                sizes = [log(size) for (_, n), size in seen.items() if n == number and size > 0 and isfinite(size)]
                mean = sum(sizes) / len(sizes) if sizes else 0.0
                if first:
                    chosen.append(exp(-mean))
                    continue
                now = log(_pick(present, number))
                deviation = mean + now
                close &= abs(deviation) < _CLOSE
                chosen.append(exp(now - deviation / self._slope(f"{what}{number}", now, deviation)))
            setattr(self, what, chosen)
        if first and reused:
            return False
        if not reused:  # scaled to one within each run
            return True
        return close

    def _slope(self, key: str, at: float, deviation: float) -> float:
        """How much the log size moves per log scale: one for parallel calls, more for calls in a chain."""
        before = self._trail.get(key)
        self._trail[key] = (at, deviation)
        most = float(len(self.calls))
        if before is None or abs(at - before[0]) < 1e-3:
            return min(2.0, most)
        return min(max((deviation - before[1]) / (at - before[0]), 1.0), most)

    def measure_update(self, gradients: Mapping[nn.Parameter, Tensor], test_lr: float) -> None:
        """Run the module again with moved weights; the update scale follows unless it is fixed."""
        own = {p: gradients[p] for p in self.module.parameters() if p in gradients}
        length = sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in own.values())
        if not self.calls or not 0 < length < inf:
            return
        changes, step = moved_outputs(self.module, self.calls, own, test_lr)
        total, count = 0.0, 0
        for outputs in changes:
            for number, change in enumerate(outputs):
                scaled = is_scaled(self.module, number)
                if scaled or isinstance(self.module, nn.RNNCellBase):
                    factor = _pick(self.activation, number) if scaled else 1.0
                    total += float((change.double() * factor).square().sum())
                    count += change.numel()
        size = (total / count) ** 0.5 / step / self._attenuation if count else 0.0
        if size > 0 and isfinite(size):
            if not self.fixed:
                self.update = 1 / size
            self.update_rms = size * self.update
        self.calls = [Call((), {}, [], []) for _ in self.calls]  # inputs are not needed any more

    def is_measured(self) -> bool:
        """Whether both an activation and a gradient of ordinary size were seen."""
        return bool(self._sizes(self._seen_activation) and self._sizes(self._seen_gradient))

    def row(self, name: str, note: str = "", unit: float = 1.0) -> ModuleScales:
        return ModuleScales(
            name,
            kind_of(self.module),
            len(self.calls),
            tuple(self.activation),
            tuple(self.gradient),
            self.update,
            self._mean(self._seen_activation, self.activation, unit),
            self._mean(self._seen_gradient, self.gradient),
            self.update_rms,
            note or self._note(),
        )

    @staticmethod
    def _sizes(seen: Mapping[tuple[int, int], float]) -> list[float]:
        return [size for size in seen.values() if size > 0 and isfinite(size)]

    def _mean(self, seen: Mapping[tuple[int, int], float], scales: list[float], unit: float = 1.0) -> float | None:
        factors = {number: _pick(scales, number) for _, number in seen}
        logs = [log(size * factors[number]) for (_, number), size in seen.items() if size > 0 and isfinite(size)]
        return unit * exp(sum(logs) / len(logs)) if logs else None

    def _note(self) -> str:
        parameters = list(self.module.parameters())
        sizes = [*self._seen_activation.values(), *self._seen_gradient.values()]
        if not self.calls:
            return "not called"
        if not all(isfinite(size) for size in sizes):
            return "NaN or infinite"
        if self._seen_activation and not any(self._seen_activation.values()):
            return "outputs are zero"
        if parameters and not any(p.requires_grad for p in parameters):
            return "frozen"
        if (
            self._seen_gradient
            and not any(self._seen_gradient.values())
            and not isinstance(self.module, nn.RNNCellBase)
        ):
            return "gets no gradient"
        return ""


def kind_of(module: nn.Module) -> str:
    """The name of the class, without what torch puts before that of a parametrized module."""
    return (type(module).__mro__[1] if is_parametrized(module) else type(module)).__name__


def _pick(values: list[float], number: int) -> float:
    return values[min(number, len(values) - 1)]


def _inverse(size: float) -> float:
    return 1 / size if size > 0 and isfinite(size) else 1.0
