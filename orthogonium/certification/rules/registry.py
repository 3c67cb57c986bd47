"""What a rule is, and how to teach the certificates a new one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Target = type[nn.Module] | Callable[..., Any] | str


class Refused(Exception):
    """A rule that cannot answer, with the reason; the tracing adds the path."""


@dataclass(frozen=True)
class Rounding:
    """How far a floating-point evaluation of a map can be from the exact one, for one sample, in the ℓ2 norm.

    At computed inputs of norms ``r_i``, with unit roundoff ``u``, the error is at most

        ``κ (Σ absolute_i r_i + offset · √(outputs / entries)) + constant · √outputs``,

    with ``κ = γ_terms + u (1 + γ_terms)``, beside what underflows.

    Attributes:
        terms: the longest chain of roundings behind one output entry; 0 if nothing is rounded.
        absolute: per input, a bound on the operator norm of the absolute values of the map.
        offset, entries: the norm of what is added to ``entries`` output entries, as a bias is, and again to the others.
        constant: an error per output entry that does not depend on the precision.
        squares: numbers on the way may be as large as squares of the inputs, and overflow earlier than the result.
    """

    terms: int = 0
    absolute: float | tuple[float, ...] = 0.0
    offset: float = 0.0
    entries: int = 1
    constant: float = 0.0
    squares: bool = False


EXACT = Rounding()


@dataclass(frozen=True)
class Response:
    """What a rule answers.

    Attributes:
        lipschitz: an upper bound on the ℓ2 Lipschitz constant, one per input that depends on the network's input.
        rounding: as :class:`Rounding`. ``None``: not known, so that the network has a bound but no certificates.
        stacked: outputs of several inputs lie side by side, so that squares add rather than norms.
        matrix: the weight ``(m, n)`` of a linear layer.
    """

    lipschitz: float | tuple[float, ...]
    rounding: Rounding | None = None
    stacked: bool = False
    matrix: Tensor | None = None


UNCHANGED = Response(1.0, EXACT)  # of what returns its input: this object, so that others cannot be taken for it


@dataclass(frozen=True)
class Variable:
    """Stands for a tensor that depends on the network's input.

    Attributes:
        shape: with the batch first, at an arbitrary batch size; ``None`` if no input shape was given.
        origin: the name of the module or function that it came from.
    """

    shape: tuple[int, ...] | None
    origin: str = ""

    def known_shape(self, why: str) -> tuple[int, ...]:
        """The shape, or a refusal that asks for it."""
        if self.shape is None:
            raise Refused(f"needs the shape of its input to {why}. Pass input_shape")
        return self.shape

    def axis(self, dim: int) -> int:
        """``dim`` counted from the front where that is known; refuses the batch."""
        if self.shape is not None:
            if not -len(self.shape) <= dim < len(self.shape):
                raise Refused(f"has dim={dim}, and its input only {len(self.shape)} dimensions")
            dim %= len(self.shape)
        if dim == 0:
            raise Refused("has dim=0, which mixes the batch: every sample is certified on its own. Use another dim")
        return dim

    def length(self, *dims: int) -> int:
        """How many entries lie along these axes."""
        shape, total = self.known_shape("count entries"), 1
        for axis in {self.axis(dim) for dim in dims}:
            total *= shape[axis]
        return total


@dataclass(frozen=True)
class Unknown:
    """Stands for a number that is not known, or not the same for every batch size."""

    reason: str = "sizes that are not known or depend on the batch. Pass input_shape"


@dataclass(frozen=True)
class Rule:
    """A registered rule. ``fresh``: its result never shares memory with an input."""

    answer: Callable[..., Response | float]
    fresh: bool


_RULES: dict[Any, Rule] = {}


def lipschitz_rule(*targets: Target, fresh: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that bounds the ℓ2 Lipschitz constant of a module or function.

    For a module type the function gets ``(module, *inputs)``, the module with its weights in float64; for a function,
    or the name of a tensor method, the arguments of the call. Tensors that depend on the network's input arrive as
    :class:`~orthogonium.certification.Variable`, which has a ``.shape``. The answer is an upper bound for all inputs,
    or a :class:`~orthogonium.certification.Response` that also bounds the rounding, without which
    :func:`~orthogonium.certify` refuses. Raise :class:`~orthogonium.certification.Refused` with a reason to decline.

    A rule is trusted. A later one replaces an earlier one. A module with a rule is not looked into.

    Args:
        targets: module types, functions such as ``torch.nn.functional.relu``, or names of tensor methods.
        fresh: promise that the result never shares memory with an input. It only matters where an operation in place
            follows.

    Raises:
        TypeError: a target is none of these.
    """
    for target in targets:
        if not (isinstance(target, str) or callable(target)):
            raise TypeError(f"a rule is for a module type, a function or the name of a method, got {target!r}")

    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            _RULES[target] = Rule(answer, fresh)
        return answer

    return register


# What a subclass may define and still compute the same.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__dict__", "__weakref__", "__repr__",
    "__firstlineno__", "__static_attributes__", "__reduce_ex__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__annotate_func_vars__", "_dims", "extra_repr", "reset_parameters",
}  # fmt: skip


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The type of ``module`` before anything was parametrized."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def rule_for_module(module: nn.Module) -> Rule | None:
    """The rule of its type, or of the nearest ancestor from which nothing that matters was overridden."""
    added: set[str] = set()
    for ancestor in plain_type(module).__mro__:
        if ancestor in _RULES:
            declared = {name for kind in ancestor.__mro__ for name in getattr(kind, "__annotations__", ())}
            return None if added & {*dir(ancestor), *declared} else _RULES[ancestor]
        added |= set(vars(ancestor)) - _HARMLESS
    return None


def rule_for_function(function: Any) -> Rule | None:
    """The rule of a function or of the name of a method."""
    try:
        return _RULES.get(function)
    except TypeError:  # not hashable
        return None


def number(value: Any, name: str) -> float:
    """``value`` as a float, or a refusal."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Unknown):
        raise Refused(f"has a {name} made from {value.reason}")
    raise Refused(f"has {name}={value!r}, which is no real number")


def sizes(value: Any, dims: int) -> tuple[int, ...]:
    """A size per axis, from a number or a sequence."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def evaluate_only(training: Any, what: str) -> None:
    """Refuse a functional call with ``training=True``."""
    if training is not False:
        raise Refused(f"calls {what} with training={training}, in an evaluation. Use training=self.training")


def no_dtype(dtype: Any) -> None:
    """Refuse a computation in another precision."""
    if dtype is not None:
        raise Refused(f"changes the precision to {dtype}. Leave dtype out")


def limited(least: Any, most: Any) -> Rounding:
    """Of ``min(max(x, least), most)`` with limits that are rounded themselves, to float32.

    A limit that lies between zero and x is off by a rounding of x, any other by one of its own.
    """
    low, high = (None if limit is None else number(limit, "limit") for limit in (least, most))
    if all(limit is None or _in_float32(limit) for limit in (low, high)):
        return EXACT
    return Rounding(1, 1.0, max(0.0, low or 0.0, -(high or 0.0)))


def filled(value: Any) -> Rounding:
    """Of entries that are set to ``value``, which float32 may have to round."""
    filling = number(value, "value")
    return EXACT if _in_float32(filling) else Rounding(1, 0.0, abs(filling))


def _in_float32(value: float) -> bool:
    return float(torch.tensor(value, dtype=torch.float64).float()) == value


def as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
