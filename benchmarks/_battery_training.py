"""Checks 55 to 58 of the battery: what training does to a layer."""

import copy
import io
from typing import Any

import torch
from _battery_contestants import Contestant, Refused, clear, free_of, gaussian

N = 8


def regression(layer: Any, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """Steps on random pairs, drawn from the number of the step."""
    n = layer.in_features
    draw = torch.Generator()
    for step in range(first, first + steps):
        draw.manual_seed(step)
        pairs = torch.randn(2, 16, n, generator=draw)
        optimizer.zero_grad()
        (layer(pairs[0]) - pairs[1]).square().mean().backward()
        optimizer.step()


def exploding_rate(subject: Contestant) -> None:
    """Thirty steps of SGD at a rate of 1e10 leave the promise intact, in training and in evaluation, or raise."""
    layer = subject.layer(N)
    try:
        regression(layer, torch.optim.SGD([free_of(layer)], 1e10), 30)
    except Exception as error:
        if clear(error):
            return
        raise
    subject.check(layer, "training")
    subject.check(layer.eval(), "evaluation")


def nan_gradient(subject: Contestant) -> None:
    """A NaN in a gradient raises at the latest in the next forward pass."""
    layer = subject.layer(N)
    optimizer = torch.optim.Adam([free_of(layer)], 1e-2)
    try:
        (layer(gaussian(4, N)).square().mean() * torch.nan).backward()
        optimizer.step()
        layer(gaussian(4, N))
    except Exception as error:
        if not clear(error):
            raise
        return
    raise Refused("training went on with NaN")


def resume(subject: Contestant) -> None:
    """Twenty steps, and ten steps saved, loaded and continued for ten: the same weight bit for bit."""
    whole = subject.layer(N)
    start = copy.deepcopy(whole.state_dict())
    regression(whole, torch.optim.Adam(whole.parameters(), 1e-2), 20)
    half = subject.layer(N)
    half.load_state_dict(start)
    optimizer = torch.optim.Adam(half.parameters(), 1e-2)
    regression(half, optimizer, 10)
    file = io.BytesIO()
    torch.save({"layer": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = subject.layer(N, seed=7)
    other.load_state_dict(saved["layer"])
    optimizer = torch.optim.Adam(other.parameters(), 1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    regression(other, optimizer, 10, first=10)
    if not torch.equal(other.eval().weight, whole.eval().weight):
        raise Refused(f"differs by {(other.weight - whole.weight).abs().max():.0e}")


def drift(subject: Contestant) -> None:
    """After 20,000 Adam steps at a rate of 1e-2 the promise holds, in training and in evaluation."""
    layer = subject.layer(N)
    regression(layer, torch.optim.Adam(layer.parameters(), 1e-2), 20_000)
    subject.check(layer, "training")
    subject.check(layer.eval(), "evaluation")


CHECKS = [
    ("rate explosion", exploding_rate),
    ("NaN gradient", nan_gradient),
    ("resume bitwise", resume),
    ("drift, 20,000 steps", drift),
]
