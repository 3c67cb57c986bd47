"""How far floating-point logits can be from exact ones, layer by layer, at an input and around it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from orthogonium.certification.network import Network, Step
from orthogonium.certification.rounding import Arithmetic, norms_up
from orthogonium.certification.rules.registry import Rounding
from orthogonium.certification.tracing import named
from orthogonium.linalg._rounding import gamma

_SLACK = 1 + 2.0**-48  # for the rounding of this computation itself


def check_rounding(network: Network) -> None:
    """Raise ``TypeError`` for a step whose rounding is not known."""
    for step in network.steps.values():
        if step.response.rounding is None:
            raise TypeError(
                f"{named(step.path)} ({step.kind}) has a bound, but nothing is known about its rounding, so that no "
                f"radius can be certified. Let its rule return a Response with a Rounding; a change of precision "
                f"belongs outside of the model"
            )


class SizeRecorder:
    """Collects the norms ``(N,)`` of those results whose rounding counts, while the network is evaluated."""

    def __init__(self, network: Network) -> None:
        self.sizes: dict[fx.Node, Tensor] = {}
        self._wanted = {node for step in network.steps.values() for node in step.inputs if _rounds(step)} | {
            node for node in network.steps if node.op == "placeholder"
        }

    def __call__(self, node: fx.Node, value: Any) -> None:
        if node in self._wanted:
            parts = [norms_up(part) for part in (value if isinstance(value, tuple | list) else [value])]
            total = parts[0] if len(parts) == 1 else torch.stack(parts).norm(dim=0) * _SLACK
            self.sizes[node] = total


def forward_error(
    network: Network,
    sizes: Mapping[fx.Node, Tensor],
    radius: Tensor,
    arithmetic: Arithmetic,
    known: Mapping[fx.Node, Tensor] | None = None,
) -> dict[fx.Node, Tensor]:
    """For every step a bound ``(N,)`` on ``‖computed − exact‖``, at the input and anywhere within ``radius`` of it.

    A step that maps exact inputs ``h_i`` to ``f(h)`` is computed from ``ĥ_i``, known up to ``e_i``. Its own constants
    ``c_i`` carry those over, and its rounding is added (Higham 2002, section 3.5):

        ``e = Σ c_i e_i + κ (Σ a_i ‖ĥ_i‖ + ‖b‖)``,  with  ``‖ĥ_i‖ ≤ ‖measured h_i‖ + L_i radius + errors``.

    Args:
        sizes: norms measured in float64 at the inputs.
        radius: ``(N,)``, how far the attacked input may be.
        arithmetic: of the evaluation that the result speaks of.
        known: the errors of the measured values, where that was another arithmetic.
    """
    errors: dict[fx.Node, Tensor] = {}
    for node, step in network.steps.items():
        if not step.inputs:
            errors[node] = torch.zeros_like(radius)
            continue
        carried = [c * errors[i] for c, i in zip(step.constants, step.inputs, strict=True)]
        if len(carried) == 1:
            total = carried[0]
        else:
            stacked = torch.stack(carried)
            total = stacked.norm(dim=0) if step.response.stacked else stacked.sum(0)
        rounding = _rounding(step)
        if _rounds(step):
            reached = []
            for i in step.inputs:
                measured = errors[i] if known is None else known[i]
                reached.append((sizes[i] + measured + errors[i] + network.steps[i].bound * radius) * _SLACK)
            total = total + _fresh(step, rounding, reached, arithmetic)
        errors[node] = (total * _SLACK).nan_to_num(nan=math.inf, posinf=math.inf)
    return errors


def _rounding(step: Step) -> Rounding:
    assert step.response.rounding is not None
    return step.response.rounding


def _rounds(step: Step) -> bool:
    rounding = _rounding(step)
    return rounding.terms > 0 or rounding.constant > 0


def _fresh(step: Step, rounding: Rounding, sizes: list[Tensor], arithmetic: Arithmetic) -> Tensor:
    """What one evaluation of the step adds."""
    outputs = 1 if step.shape is None else max(1, math.prod(step.shape))
    terms = gamma(rounding.terms, arithmetic.roundoff)
    kappa = 2 * (terms + arithmetic.roundoff * (1 + terms))  # twice: room for the rounding of this bound
    absolute = rounding.absolute if isinstance(rounding.absolute, tuple) else (rounding.absolute,) * len(sizes)
    scale = sum((a * size for a, size in zip(absolute, sizes, strict=True)), torch.zeros_like(sizes[0]))
    scale = scale + rounding.offset * math.sqrt(max(1.0, outputs / rounding.entries))
    lost = 4 * rounding.terms * arithmetic.smallest + rounding.constant
    fresh = kappa * scale + lost * math.sqrt(outputs)
    limit = torch.finfo(arithmetic.dtype).max * 2.0**-20
    overflows = scale > (math.sqrt(limit) if rounding.squares else limit)
    return torch.where(overflows, math.inf, fresh)
