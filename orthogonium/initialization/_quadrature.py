"""Integrals against the Gaussian density that stay exact across kinks: composite Gauss–Legendre, split where needed."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_REACH = 38.0  # the density underflows soon after
_TOLERANCE = 1e-15  # per panel, of the whole integral
_LEVELS = 60  # halvings; a panel is then as wide as the spacing of floating-point numbers
_MANY = 256  # open panels: no longer some kinks, but rounding noise or oscillation all over
_NOISE = 1e-9  # change of the integral by all open panels that rounding noise explains
_MOST = 2**15  # open panels, when giving up


def _legendre(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss–Legendre quadrature on [−1, 1], by Newton's method on the recurrence."""
    orders = torch.arange(points, dtype=torch.float64, device="cpu")
    nodes = torch.cos(math.pi * (orders + 0.75) / (points + 0.5))
    slope = torch.ones_like(nodes)
    for _ in range(20):
        before, value = torch.ones_like(nodes), nodes
        for n in range(2, points + 1):
            before, value = value, ((2 * n - 1) * nodes * value - (n - 1) * before) / n
        slope = points * (nodes * value - before) / (nodes**2 - 1)
        nodes = nodes - value / slope
    return nodes, 2 / ((1 - nodes**2) * slope**2)


_NODES, _WEIGHTS = _legendre(16)

Integrands = Callable[[Tensor], Tensor]


def integrate(integrands: Integrands, breaks: Tensor) -> Tensor:
    """Integrals of several functions at once over consecutive panels.

    Each panel gets 16 points, then twice 16 on its halves. Where the two disagree the halves become panels of their
    own, so an unknown kink or a sharp bend costs about fifty narrow panels and no accuracy.

    Args:
        integrands: ``(N,)`` points to ``(K, N)`` values, in float64.
        breaks: ``(P + 1,)``, ascending: where panels begin and end. Put known kinks here.

    Returns:
        ``(K,)``.

    Raises:
        ValueError: they do not converge.
    """
    lower, upper = breaks[:-1], breaks[1:]
    coarse = _panel_sums(integrands, lower, upper)
    total = torch.zeros_like(coarse[:, 0])
    scale = coarse.abs().sum(1)
    for _ in range(_LEVELS):
        middle = (lower + upper) / 2
        halves = _panel_sums(integrands, torch.cat((lower, middle)), torch.cat((middle, upper)))
        fine = halves.unflatten(1, (2, -1)).sum(1)
        scale = torch.maximum(scale, total.abs() + fine.abs().sum(1))
        error = (fine - coarse).abs()
        open_ = (error > _TOLERANCE * scale[:, None]).any(0)
        count = int(open_.sum())
        if count == 0 or (count > _MANY and bool((error.sum(1) <= _NOISE * scale).all())):
            return total + fine.sum(1)
        total = total + fine[:, ~open_].sum(1)
        both = torch.cat((open_, open_))
        lower, upper = torch.cat((lower, middle))[both], torch.cat((middle, upper))[both]
        coarse = halves[:, both]
        if count > _MOST:
            break
    left = coarse.abs().sum(1)
    if bool((left > 1e-9 * scale).any()):
        raise ValueError("the integral does not converge: a value or a slope grows without bound at some point")
    return total + coarse.sum(1)


def _panel_sums(integrands: Integrands, lower: Tensor, upper: Tensor) -> Tensor:
    half = (upper - lower)[:, None] / 2
    points = lower[:, None] + half * (1 + _NODES)
    values = integrands(points.flatten()).unflatten(1, (-1, _NODES.numel()))
    return (values * (half * _WEIGHTS)).sum(2)


def gaussian_expectation(functions: Integrands, kinks: Sequence[float] = (), width: float = 1.0) -> Tensor:
    """``E f(z)`` for a standard Gaussian ``z``, of several functions at once.

    Args:
        functions: ``(N,)`` points to ``(K, N)`` values, in float64.
        kinks: where the functions bend; those out of reach of the density are left out.
        width: on what scale they change around zero. Below one, panels narrow towards zero down to a quarter of it.

    Returns:
        ``(K,)``.
    """
    grid = torch.arange(-_REACH, _REACH + 1, dtype=torch.float64, device="cpu")
    inside = [kink for kink in kinks if abs(kink) < _REACH]
    if width < 1:
        narrow = [0.25 * width * 2**k for k in range(math.ceil(math.log2(4 / width)))]
        inside += [*narrow, *(-edge for edge in narrow)]
    breaks = torch.cat((grid, torch.tensor(inside, dtype=torch.float64, device="cpu"))).unique()

    def weighted(z: Tensor) -> Tensor:
        return functions(z) * (torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))

    return integrate(weighted, breaks)
