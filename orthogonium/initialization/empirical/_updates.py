"""How far one step of the optimiser moves what a module returns, measured by taking a step and running it again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.initialization.empirical._trees import signals


@dataclass
class Call:
    """One call of a module: its arguments, what it returned, and the random state before."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    random_state: list[Tensor]


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _same_randomness(call: Call, device: torch.device) -> Iterator[None]:
    before = random_state(device)
    set_random_state(call.random_state, device)
    try:
        yield
    finally:
        set_random_state(before, device)


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens inside, these tensors hold the same numbers afterwards."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def moved_outputs(
    module: nn.Module, calls: Sequence[Call], directions: Mapping[nn.Parameter, Tensor], test_lr: float
) -> tuple[list[list[Tensor]], float]:
    """Differences of the outputs of every call when parameters move by ``−h · direction``, and the step ``h``.

    ``h`` is ``test_lr``, kept where neither rounding nor curvature spoils the difference: between the cube root of the
    machine precision and a tenth (or that root, if larger) of the size of the parameters. Buffers and random numbers
    are those of the original call, and parameters are put back.

    Returns:
        per call, per floating-point output, ``output after − output before`` in float32 or better; and ``h``.
    """
    size = _norm(list(directions))
    length = _norm(list(directions.values()))
    precision = max(torch.finfo(parameter.dtype).eps for parameter in directions) ** (1 / 3)
    if size == 0:  # weights that start at zero have no size of their own
        size = sum(parameter.numel() for parameter in directions) ** 0.5
    least = precision * size / length
    step = min(max(test_lr, least), max(0.1 * size / length, least))
    changes = []
    parameters = list(directions)
    device = parameters[0].device
    with torch.no_grad(), kept(parameters):
        for parameter, direction in directions.items():
            parameter.copy_(_wide(parameter) - step * _wide(direction))
        for call in calls:
            with kept(list(module.buffers())), _same_randomness(call, device):
                after = signals(module(*call.args, **call.kwargs))
            changes.append([_wide(a) - _wide(b) for a, b in zip(after, call.outputs, strict=True)])
    return changes, step


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor.detach()


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(float(_wide(tensor).detach().norm()) ** 2 for tensor in tensors)) ** 0.5
