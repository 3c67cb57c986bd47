"""Where signals neither die nor explode: fixed points of the variance, and weights and biases at which χ is one."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from orthogonium.initialization._elementwise import ActivationLike, Elementwise, as_elementwise
from orthogonium.initialization.mean_field import Moments, check_scales, moments

ISOMETRY_SPREAD = 0.1  # variance of the squared singular values of the whole network that counts as isometric
_VANISHING = 1e-200  # a variance so small that only the slopes at zero count
_GRID = [10 ** (k / 4) for k in range(-24, 25)]  # variances from 1e-6 to 1e6
_SAME = 1e-9  # what counts as equal in slopes and signs


class UnstableVarianceWarning(UserWarning):
    """At the critical point, variances drift away from their fixed point: signals die or explode slowly."""


@dataclass(frozen=True)
class FixedPoint:
    """A variance ``q`` that layers ``h ← W φ(h) + b`` map to itself, and what they do nearby.

    Attributes:
        activation: its name.
        sigma_w, sigma_b: scale of orthogonal weights (Gaussian ones have variance ``sigma_w² / fan_in``) and standard
            deviation of biases.
        q: variance of pre-activations; zero where the fixed point is the limit of vanishing signals.
        chi: factor of the squared gradient per layer; 1 is critical, more explodes, less dies.
        slope: derivative of the map of variances at ``q``.
        spread: variance of the squared singular values of the Jacobian that each layer adds if weights are orthogonal;
            Gaussian weights add one more.
        stability: ``"stable"``; ``"unstable"``: variances drift away; ``"half-stable"``: they return from one side;
            ``"neutral"``: every variance is a fixed point.
        second_moment: of the activations, ``E φ²``.
    """

    activation: str
    sigma_w: float
    sigma_b: float
    q: float
    chi: float
    slope: float
    spread: float
    stability: str
    second_moment: float

    @property
    def input_scale(self) -> float:
        """Root mean square that inputs should have to start at ``q``; 1 where ``q`` is not fixed or vanishes."""
        return math.sqrt(self.second_moment) if self.q > 0 and self.stability != "neutral" else 1.0


def criticality(
    activation: ActivationLike, depth: int | None = None, *, q: float | None = None, bias: bool = False
) -> FixedPoint:
    """Scales of weights and biases at which gradients keep their size through any number of layers, χ = 1.

    Without further arguments biases are zero. The others choose a point on the line of critical points, along which a
    larger variance of biases holds signals at a larger ``q``. Only one of them can be given.

    Args:
        activation: a name, a module or a function of one number.
        depth: the largest ``q`` at which ``depth`` layers with orthogonal weights are still nearly an isometry: the
            squared singular values of their Jacobian have variance :data:`ISOMETRY_SPREAD`, 0.1.
        q: the variance at which to be critical.
        bias: the half-stable point with biases, for activations such as gelu that are unstable without.

    Warns:
        UnstableVarianceWarning: signals drift away from the fixed point found.

    Raises:
        ValueError: more than one of ``depth``, ``q`` and ``bias``; there is no such point (the message says why); or
            the activation mixes inputs or has no moments.

    Source:
        Poole et al., NeurIPS 2016; Schoenholz et al., "Deep information propagation", ICLR 2017; Pennington,
        Schoenholz and Ganguli, "Resurrecting the sigmoid", NeurIPS 2017; Roberts, Yaida and Hanin, "The principles of
        deep learning theory", 2022, for half-stable points.
    """
    point = critical_point(as_elementwise(activation), depth, q, bias)
    warn_if_unstable(point)
    return point


def critical_point(
    phi: Elementwise, depth: int | None = None, q: float | None = None, bias: bool = False
) -> FixedPoint:
    """What :func:`criticality` returns, without its warning."""
    if (depth is not None) + (q is not None) + bool(bias) > 1:
        raise ValueError("depth, q and bias each choose a critical point: give one of them")
    if q is not None:
        if not 0 < q < math.inf:
            raise ValueError(f"q must be positive and finite, got {q}")
        return _on_critical_line(phi, q)
    if depth is not None:
        return _isometric(phi, depth)
    return _half_stable(phi) if bias else _without_bias(phi)


def warn_if_unstable(point: FixedPoint) -> None:
    """Warn, in the line of the caller's caller, where variances drift away from ``point``."""
    if point.stability == "unstable":
        warnings.warn(
            f"{point.activation} is critical at sigma_w={point.sigma_w:.6g}, sigma_b={point.sigma_b:.6g}, but "
            f"variances drift away from q={point.q:.6g}: deep stacks die or explode. "
            "criticality(activation, bias=True) looks for a point with biases that holds.",
            UnstableVarianceWarning,
            stacklevel=3,
        )


def fixed_point(activation: ActivationLike, sigma_w: float, sigma_b: float = 0.0) -> FixedPoint:
    """Where variances settle under given scales, from one on, and the χ there.

    Args:
        activation: a name, a module or a function of one number.
        sigma_w, sigma_b: scale of weights and standard deviation of biases.

    Raises:
        ValueError: variances grow without end, scales that are not positive, or an activation without moments.
    """
    phi = as_elementwise(activation)
    check_scales(sigma_w, sigma_b)

    def excess(q: float) -> float:
        return (sigma_w**2 * moments(phi, q).second + sigma_b**2) / q - 1

    start = excess(1.0)
    if abs(start) < _SAME:
        return _describe(phi, 1.0, sigma_w, sigma_b)
    factor = 10 ** (1 / 8) if start > 0 else 10 ** (-1 / 8)
    here, there = 1.0, factor
    while 1e-12 < there < 1e12:
        if (excess(there) > 0) != (start > 0):
            q = _root(excess, min(here, there), max(here, there))
            return _describe(phi, q, sigma_w, sigma_b)
        here, there = there, there * factor
    if start > 0:
        raise ValueError(f"with {phi.name}, sigma_w={sigma_w} and sigma_b={sigma_b} variances grow without end")
    return _describe(phi, 0.0, sigma_w, sigma_b)


def _describe(phi: Elementwise, q: float, sigma_w: float, sigma_b: float) -> FixedPoint:
    here = moments(phi, q or _VANISHING)
    slope = sigma_w**2 * here.growth
    if _is_neutral(phi, sigma_w, sigma_b):
        stability = "neutral"
    elif q > 0 or abs(slope - 1) > _SAME:
        stability = "half-stable" if abs(slope - 1) < 1e-7 else "stable" if slope < 1 else "unstable"
    else:
        stability = "unstable" if _drift(phi, sigma_w) > 0 else "stable"
    chi, second = sigma_w**2 * here.slope2, here.second if q > 0 else 0.0
    return FixedPoint(phi.name, sigma_w, sigma_b, q, chi, slope, here.spread, stability, second)


def _is_neutral(phi: Elementwise, sigma_w: float, sigma_b: float) -> bool:
    ratios = [sigma_w**2 * moments(phi, q).second / q for q in (1e-4, 1.0, 1e4)]
    return sigma_b == 0 and all(abs(ratio - 1) < _SAME for ratio in ratios)


def _drift(phi: Elementwise, sigma_w: float) -> float:
    """How the smallest signals that differ from a linear network's begin to move: relative change of the variance."""
    for q in _GRID:
        change = sigma_w**2 * moments(phi, q).second / q - 1
        if abs(change) > _SAME:
            return change
    return 0.0


def _critical_weight(phi: Elementwise, here: Moments) -> float:
    if not here.slope2 > 1e-280:
        raise ValueError(f"{phi.name} has slope zero where the signal is, so no weight passes gradients on")
    return 1 / math.sqrt(here.slope2)


def _imbalance(phi: Elementwise, q: float) -> float:
    """Of both conditions without bias, ``σ_w² E φ² = q`` and ``σ_w² E φ'² = 1``: zero where one weight meets both."""
    here = moments(phi, q)
    return here.second / (q * here.slope2) - 1 if here.slope2 > 0 else math.inf


def _without_bias(phi: Elementwise) -> FixedPoint:
    found: list[FixedPoint] = []
    _critical_weight(phi, moments(phi, 1.0))  # or its error
    before: tuple[float, float] | None = None
    for q in _GRID:
        size = _imbalance(phi, q)
        if abs(size) < _SAME or not math.isfinite(size):
            continue
        if before is not None and (before[1] > 0) != (size > 0):
            root = _root(lambda q: _imbalance(phi, q), before[0], q)
            found.append(_describe(phi, root, _critical_weight(phi, moments(phi, root)), 0.0))
        before = (q, size)
    if abs(phi.at_zero) < 1e-15 and moments(phi, _VANISHING).slope2 > 1e-12:
        found.append(_describe(phi, 0.0, _critical_weight(phi, moments(phi, _VANISHING)), 0.0))
    if not found:
        chi = moments(phi, 1.0).slope2 / max(moments(phi, 1.0).second, 1e-300)
        raise ValueError(
            f"{phi.name} has no critical point without bias: no weight keeps both signals and gradients (one that "
            f"keeps signals of variance one changes the squared gradient by {chi:.4g} per layer)"
        )
    order = ["stable", "half-stable", "neutral", "unstable"]
    return min(found, key=lambda point: order.index(point.stability))


def _on_critical_line(phi: Elementwise, q: float) -> FixedPoint:
    here = moments(phi, q)
    sigma_w = _critical_weight(phi, here)
    bias2 = q - sigma_w**2 * here.second
    if bias2 < -1e-12 * q:
        raise ValueError(
            f"{phi.name} cannot be critical at q={q:.6g}: its activations alone exceed that variance, and a bias only "
            "adds to it"
        )
    return _describe(phi, q, sigma_w, math.sqrt(bias2) if bias2 > 1e-15 * q else 0.0)


def _half_stable(phi: Elementwise) -> FixedPoint:
    """On the critical line, the ``q`` at which the slope of the map of variances falls through one."""

    def excess(q: float) -> float:
        here = moments(phi, q)
        return here.growth / here.slope2 - 1

    sizes = [(q, excess(q)) for q in _GRID]
    sizes = [(q, size) for q, size in sizes if abs(size) > _SAME]
    for (q, size), (further, next_size) in pairwise(sizes):
        if size > 0 > next_size:
            return _on_critical_line(phi, _root(excess, q, further))
    if sizes and sizes[0][1] < 0:
        raise ValueError(f"{phi.name} needs no bias to be stable: leave bias out, or choose depth or q")
    raise ValueError(f"{phi.name} has no half-stable critical point between q=1e-6 and 1e6")


def _isometric(phi: Elementwise, depth: int) -> FixedPoint:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be an integer of at least 1, got {depth!r}")
    limit = ISOMETRY_SPREAD / depth
    spreads = [moments(phi, q).spread for q in _GRID]
    least = min(spreads)
    if least > limit:
        most = int(ISOMETRY_SPREAD / least)
        hint = f"It is up to depth {most}." if most else "Use looks_linear_ weights where the activation allows."
        raise ValueError(
            f"{depth} layers of {phi.name} are no isometry at any scale: the variance of their squared singular "
            f"values is at least {depth * least:.3g}, above {ISOMETRY_SPREAD}. {hint}"
        )
    if max(spreads) <= limit:
        return _without_bias(phi)
    start = next(i for i, size in enumerate(spreads) if size <= limit)
    for q, further, size in zip(_GRID[start:], _GRID[start + 1 :], spreads[start + 1 :], strict=False):
        if size > limit:
            return _on_critical_line(phi, _root(lambda q: moments(phi, q).spread - limit, q, further))
    return _on_critical_line(phi, _GRID[-1])


def _root(function: Callable[[float], float], lower: float, upper: float) -> float:
    """Where a sign change sits between two positive numbers, to the last digits, by bisection with secant steps."""
    low, high = function(lower), function(upper)
    for step in range(200):
        if step % 3 < 2 and high != low:
            middle = lower - low * (upper - lower) / (high - low)
            margin = 1e-3 * (upper - lower) if step % 3 else 0.0
            middle = min(max(middle, lower + margin), upper - margin)
        else:
            middle = math.sqrt(lower * upper)
        if not lower < middle < upper:
            middle = (lower + upper) / 2
            if not lower < middle < upper:
                break
        value = function(middle)
        if value == 0:
            return middle
        if (value > 0) == (low > 0):
            lower, low = middle, value
        else:
            upper, high = middle, value
        if upper - lower < 4e-16 * upper:
            break
    return lower if abs(low) < abs(high) else upper
