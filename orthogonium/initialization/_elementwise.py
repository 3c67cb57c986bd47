"""An activation seen as a function of one number: its values, slopes, kinks and steepest slope."""

import copy
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ActivationLike = str | nn.Module | Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


_LINEAR = [f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)]
NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("linear", "identity", *_LINEAR), _identity),
    "celu": F.celu,
    "elu": F.elu,
    "erf": torch.erf,
    "gelu": F.gelu,
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "swish": F.silu,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
}
_MIXING = {
    "softmax": "every output depends on all inputs, so the gain depends on how many there are",
    "log_softmax": "every output depends on all inputs, so the gain depends on how many there are",
    "glu": "it multiplies one half of the features by a function of the other half",
}
_PARAMETER = {  # what the single number of calculate_gain means
    "celu": "alpha",
    "elu": "alpha",
    "leaky_relu": "negative_slope",
    "softplus": "beta",
    "hardshrink": "lambd",
    "softshrink": "lambd",
}
_REARRANGEABLE = 5040  # divisible by every group size that is likely


class Elementwise:
    """A resolved activation, evaluated in float64 on the CPU.

    Args:
        activation: a name, a module or a function of a tensor. Modules are copied, in evaluation mode.
        param: the one number that a named activation takes.

    Raises:
        ValueError: an unknown name, a ``param`` that means nothing, several inputs mixed, random or non-finite values.
        TypeError: neither name nor callable, or a result that is no float64 tensor.
    """

    def __init__(self, activation: ActivationLike, param: float | None = None) -> None:
        self.name, self._function = _resolve(activation, param)
        self._check()

    def value(self, x: Tensor) -> Tensor:
        """``φ(x)``, ``(N,)``."""
        return self.value_and_slope(x)[0]

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``φ(x)`` and ``φ'(x)`` as autograd has it, ``(N,)`` each."""
        with torch.inference_mode(False), torch.enable_grad():
            points = x.detach().clone().requires_grad_()
            value = self._function(points)
            if not value.requires_grad:  # constant, as sign or round
                return value, torch.zeros_like(x)
            (slope,) = torch.autograd.grad(value.sum(), points, allow_unused=True)
        return value.detach(), torch.zeros_like(x) if slope is None else slope

    @property
    def at_zero(self) -> float:
        return float(self.value(torch.zeros(1, dtype=torch.float64, device="cpu")))

    @cached_property
    def kinks(self) -> tuple[float, ...]:
        """Zero, and where ``φ`` or ``φ'`` jumps: halving intervals leaves it between neighbouring numbers."""
        return tuple(sorted({0.0, *self._jumps(0), *self._jumps(1)}))

    @cached_property
    def steepest(self) -> float:
        """The Lipschitz constant: the largest ``|φ'|``, found on a grid and sharpened, so right up to rounding.

        Raises:
            ValueError: there is none, since ``φ`` jumps or its slope grows without end.
        """
        if any(True for _ in self._jumps(0)):
            raise ValueError(f"{self.name} jumps, so it has no Lipschitz constant")
        x = _grid()
        slopes = self.value_and_slope(x)[1].abs()
        if bool(slopes[[0, -1]].max() > 1.5 * slopes[len(x) // 4 : -len(x) // 4].max()):
            raise ValueError(f"the slope of {self.name} grows without end, so it has no Lipschitz constant")
        best = slopes.max()
        top = int(slopes.argmax())
        lower, upper = x[max(top - 1, 0)], x[min(top + 1, len(x) - 1)]
        for _ in range(12):  # each round narrows the bracket thirtyfold
            inner = lower + (upper - lower) * torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu")
            slopes = self.value_and_slope(inner)[1].abs()
            top = int(slopes.argmax())
            best = torch.maximum(best, slopes[top])
            lower, upper = inner[max(top - 1, 0)], inner[min(top + 1, 64)]
        return float(best)

    def _jumps(self, order: int) -> list[float]:
        """Where the value (0) or the slope (1) jumps by more than a millionth of its largest size nearby."""
        x = _grid()
        lower, upper = x[:-1], x[1:]
        values = self.value_and_slope(x)[order]
        low, high = values[:-1], values[1:]
        for _ in range(70):
            size = 1 + torch.maximum(low.abs(), high.abs())
            keep = (high - low).abs() > 1e-6 * size
            lower, upper, low, high = lower[keep], upper[keep], low[keep], high[keep]
            middle = (lower + upper) / 2
            inside = (middle > lower) & (middle < upper)
            if not bool(inside.any()):
                break
            centre = self.value_and_slope(middle)[order]
            left = (centre - low).abs() > (high - centre).abs()
            lower, upper = torch.where(left | ~inside, lower, middle), torch.where(left & inside, middle, upper)
            low, high = torch.where(left | ~inside, low, centre), torch.where(left & inside, centre, high)
        return [0.0 if abs(kink) < 1e-12 else kink for kink in upper.tolist()]

    def _check(self) -> None:
        x = torch.linspace(-3, 3, 3 * _REARRANGEABLE, dtype=torch.float64, device="cpu")
        x = (x * 1.37 + torch.sin(7 * x)).view(3, _REARRANGEABLE)  # unequal steps, so that a mean or a sort shows
        order = torch.randperm(_REARRANGEABLE, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        x = x[:, order]
        y = self._call(x)
        if y.shape == x.shape and not torch.equal(y, x) and torch.equal(y.sort(1).values, x.sort(1).values):
            self._function = _identity  # only norms matter, and it keeps all of them
            return
        if y.shape != x.shape:
            raise ValueError(
                f"{self.name} mixes its inputs: shape {tuple(x.shape)} became {tuple(y.shape)}. "
                "Gains are for functions of one number, applied to each entry."
            )
        if not torch.equal(self._call(x), y):
            raise ValueError(f"{self.name} draws random numbers. Pass what it does on average, or its evaluation mode.")
        alone = self._call(x.flatten()[::17].clone().view(-1, 1)).flatten()
        turned = self._call(x.flip(0, 1)).flip(0, 1)
        tolerance = 1e-12 * (1 + y.abs().max())  # vectorised and scalar code may round differently
        if max((alone - y.flatten()[::17]).abs().max(), (turned - y).abs().max()) > tolerance:
            raise ValueError(
                f"{self.name} mixes its inputs: an entry's output depends on the other entries. "
                "Gains are for functions of one number, applied to each entry."
            )

    def _call(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                y: Any = self._function(x)
        except Exception as error:
            raise ValueError(
                f"{self.name} cannot be applied to each entry of a tensor of shape {tuple(x.shape)}: {error}"
            ) from error
        if not isinstance(y, Tensor) or y.dtype != torch.float64:
            found = f"a {y.dtype} tensor" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{self.name} must return a float64 tensor for a float64 tensor, got {found}")
        if not bool(torch.isfinite(y).all()):
            raise ValueError(f"{self.name} is not finite everywhere, so it has no moments")
        return y


def as_elementwise(activation: "ActivationLike | Elementwise", param: float | None = None) -> Elementwise:
    """:class:`Elementwise`, made once per name so that what was computed for it is remembered."""
    if isinstance(activation, Elementwise):
        return activation
    return _named(activation, param) if isinstance(activation, str) else Elementwise(activation, param)


@lru_cache(maxsize=256)
def _named(name: str, param: float | None) -> Elementwise:
    return Elementwise(name, param)


def _resolve(activation: ActivationLike | object, param: float | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    if isinstance(activation, str):
        return _resolve_name(activation, param)
    if param is not None:
        raise ValueError("param goes with a name. Bind it yourself: lambda x: torch.nn.functional.elu(x, 0.5)")
    if isinstance(activation, nn.Module):
        if isinstance(activation, nn.Softmax | nn.LogSoftmax | nn.Softmax2d | nn.GLU):
            kind = "glu" if isinstance(activation, nn.GLU) else "softmax"
            raise ValueError(f"{type(activation).__name__} has no gain: {_MIXING[kind]}")
        with torch.inference_mode(False):
            return type(activation).__name__, copy.deepcopy(activation).to("cpu", torch.float64).eval()
    if isinstance(activation, type):
        raise TypeError(f"activation must be an instance such as {activation.__name__}(), got the class")
    if not callable(activation):
        raise TypeError(f"activation must be a name, a module or a function of a tensor, got {activation!r}")
    return getattr(activation, "__name__", type(activation).__name__), activation


def _resolve_name(name: str, param: float | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    key = name.lower().removesuffix("_")
    if key in _MIXING:
        raise ValueError(f"{name} has no gain: {_MIXING[key]}")
    if key not in NAMED:
        raise ValueError(f"unknown activation {name!r}. Known: {', '.join(NAMED)}; or pass a function or a module.")
    if param is None:
        return key, NAMED[key]
    if isinstance(param, bool) or not isinstance(param, int | float):
        raise TypeError(f"param must be a number, got {param!r}")
    if key not in _PARAMETER:
        raise ValueError(f"{name} takes no param, got {param}. Those that do: {', '.join(_PARAMETER)}")
    return f"{key}({_PARAMETER[key]}={param})", partial(NAMED[key], **{_PARAMETER[key]: param})


def _grid() -> Tensor:
    """Points from −1e4 to 1e4, a hundredth apart around zero and further apart outside."""
    near = torch.linspace(-40, 40, 8001, dtype=torch.float64, device="cpu")
    far = torch.logspace(1.7, 4, 400, dtype=torch.float64, device="cpu")
    return torch.cat((-far.flip(0), near + 0.00371, far))
