"""Networks and inputs on which rounding decides, and a search for perturbations that it lets through."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import orthogonium as og
from orthogonium.certification import certificates
from orthogonium.certification.rounding import Arithmetic
from orthogonium.models import lipschitz_mlp


@dataclass(frozen=True)
class Outcome:
    """``certified`` of ``points`` had a radius above zero; ``flips`` of ``tries`` inputs inside changed their class;
    ``broken`` points had at least one of them."""

    points: int
    certified: int
    tries: int
    flips: int
    broken: int


class Residual(nn.Module):
    """Adds large numbers and takes most of them away again."""

    def __init__(self, features: int, size: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(features, features, dtype=dtype), og.MaxMin())
        nn.init.constant_(self.inner[0].bias, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) - self.inner[0].bias


def networks(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Small classifiers whose logits are small differences of large numbers."""
    torch.manual_seed(0)
    size = 2.0**40 if dtype == torch.float64 else 2.0**12
    kind = {"dtype": dtype}

    def shifted(layer: nn.Linear, value: float) -> nn.Linear:
        with torch.no_grad():
            layer.bias.fill_(value)
        return layer

    classifiers = {
        "equal large biases": nn.Sequential(shifted(nn.Linear(16, 4, **kind), size)),
        "a large offset that cancels": nn.Sequential(
            shifted(nn.Linear(16, 16, **kind), size), og.MaxMin(), nn.Linear(16, 4, bias=False, **kind)
        ),
        "orthogonal layers": lipschitz_mlp(16, 4, width=32, depth=4, **kind),
        "a residual with large numbers": nn.Sequential(Residual(16, size, dtype), nn.Linear(16, 4, **kind)),
        "scales far apart": nn.Sequential(
            nn.Linear(16, 16, **kind), nn.ReLU(), nn.Linear(16, 16, **kind), og.MaxMin(), nn.Linear(16, 4, **kind)
        ),
        "one logit": nn.Sequential(nn.Linear(16, 16, **kind), og.MaxMin(), shifted(nn.Linear(16, 1, **kind), 0.25)),
        "convolutions": nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), og.OrthoConv2d(1, 4, 3, **kind), og.MaxMin(), nn.AvgPool2d(2, 1),
            nn.Flatten(), shifted(nn.Linear(36, 4, **kind), size),
        ),
    }  # fmt: skip
    with torch.no_grad():
        head = classifiers["a large offset that cancels"][2].weight
        head.sub_(head.mean(1, keepdim=True))
        classifiers["scales far apart"][0].weight.mul_(1e6)
        classifiers["scales far apart"][2].weight.mul_(1e-6)
    return {name: model.eval() for name, model in classifiers.items()}


def _classes(logits: Tensor) -> Tensor:
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def near_boundaries(model: nn.Module, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Inputs close to a boundary found by bisection: at steps of many sizes, and as close as certificates go."""
    generator = torch.Generator().manual_seed(seed)
    lines = max(64, 8 * count)
    a, b = torch.randn(2, lines, 16, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        crossed = _classes(model(a)) != _classes(model(b))
        a, b = a[crossed][:count], b[crossed][:count]
        start = _classes(model(a))
        far = b
        for _ in range(60):
            middle = a + (far - a) / 2
            same = (_classes(model(middle)) == start)[:, None]
            a, far = torch.where(same, middle, a), torch.where(same, far, middle)
    decades = -(0.5 + (7.5 if dtype == torch.float32 else 15.5) * torch.rand(len(a), 1, generator=generator))
    x = a + (a - b) * 10 ** decades.to(dtype)
    closest = x.clone()  # the least step, of half a decade each, from which on there is a certificate
    found = torch.zeros(len(a), dtype=torch.bool)
    arithmetic = Arithmetic.of(dtype)
    network = certificates._network(model, x, arithmetic)
    for step in range(-32, 7):
        candidate = a + (a - b) * 10 ** (step / 2)
        now = (certificates._certify(network, candidate, None, arithmetic).radius > 0) & ~found
        closest[now], found = candidate[now], found | now
    return torch.cat([x, closest[found]])


def attack_rounding(
    model: nn.Module, x: Tensor, tries: int, precision: torch.dtype, seed: int = 0, *, count_rounding: bool = True
) -> Outcome:
    """Try ``tries`` inputs per certified point at its radius: the worst direction and random ones, every coordinate
    rounded up or down at random, sums in random orders.

    Args:
        count_rounding: without, radii are what the margin alone gives, as a naive certificate has it.
    """
    generator = torch.Generator().manual_seed(seed)
    certificate = og.certify(model, x, precision=precision)
    prediction, radius = certificate.prediction, certificate.radius
    if not count_rounding:
        radius = _naive(model, x, precision)
        with torch.no_grad():
            prediction = _classes(model(x))
    chosen = (radius > 0).nonzero().flatten()
    flips, done, broken = 0, 0, 0
    for i in chosen.tolist():
        inputs = _inside(model, x[i], float(radius[i]), tries, generator)
        half = len(inputs) // 2
        with torch.no_grad():  # batches of several sizes sum in several orders
            classes = [_classes(model(part)) for part in (*inputs[:half].split(61), inputs[half:])]
        flipped = torch.cat(classes) != prediction[i]
        flips, done, broken = flips + int(flipped.sum()), done + len(inputs), broken + int(flipped.any())
    return Outcome(len(x), len(chosen), done, flips, broken)


def _naive(model: nn.Module, x: Tensor, precision: torch.dtype) -> Tensor:
    """Margin over Lipschitz constant, as if arithmetic were exact."""
    network = certificates.analyse(model, x.shape[1:])
    with torch.no_grad():
        logits = model(x).double()
    if logits.shape[1] == 1:
        return logits.abs()[:, 0] / network.bound
    top = logits.argmax(1)
    gaps = logits.gather(1, top[:, None]) - logits
    reach = certificates._reach(network, logits.shape[1])[top]
    return (gaps / reach).masked_fill(nn.functional.one_hot(top, logits.shape[1]).bool(), math.inf).amin(1)


def _inside(model: nn.Module, x: Tensor, radius: float, tries: int, generator: torch.Generator) -> Tensor:
    """Representable inputs at distance at most ``radius`` of ``x``, many of them at nearly that."""
    point = x.detach().clone().requires_grad_()
    logits = model(point[None])[0]
    top = int(logits.argmax())
    directions = []
    for j in range(len(logits)):
        if j != top or len(logits) == 1:
            gap = logits[top] - logits[j] if len(logits) > 1 else logits[0] * logits[0].sign()
            (slope,) = torch.autograd.grad(gap, point, retain_graph=True)
            directions.append(-slope.double())
    worst = torch.stack([d / d.norm().clamp_min(1e-300) for d in directions])
    noise = torch.randn(tries, x.numel(), generator=generator, dtype=torch.float64)
    share = torch.rand(tries, 1, generator=generator, dtype=torch.float64) ** 4  # most close to the worst
    mixed = worst[torch.arange(tries) % len(worst)] + share * noise / noise.norm(dim=1, keepdim=True)
    shrink = 1 - 0.02 * torch.rand(tries, 1, generator=generator, dtype=torch.float64) ** 8
    steps = mixed / mixed.norm(dim=1, keepdim=True) * radius * shrink
    rounded = (x.double() + steps).to(x.dtype)
    up = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    down = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    turn = torch.rand(rounded.shape, generator=generator)
    moved = torch.where(turn < 1 / 3, up, torch.where(turn < 2 / 3, down, rounded))
    inside = torch.full_like(rounded, 0) + x.detach()
    for candidates in (rounded, moved):  # those that the random rounding takes outside fall back
        distance = (candidates.double() - x.double()).norm(dim=1, keepdim=True) * (1 + 1e-13)
        inside = torch.where(distance <= radius, candidates, inside)
    return inside
