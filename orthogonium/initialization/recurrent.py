"""Starting values for recurrent layers, gate by gate."""

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.initialization._filling import Draw
from orthogonium.parametrizations.torch_weights import stacked_blocks

HORIZON = 100  # time steps, where nothing else is asked
# The longest memory of a unit over the horizon: with times of up to 10 horizons, the root mean square of what units
# keep over one is 0.76; with times of up to one horizon it is 0.2, and most of the state would be gone.
_LONGEST = 10


def is_gated(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell)


def initialize_recurrent(module: nn.Module, draw: Draw, recurrent_gain: float, horizon: int = HORIZON) -> str:
    """Fill every matrix of a recurrent layer, each gate's block on its own, and every bias; says what it did.

    An orthogonal matrix of all gates stacked leaves each gate a contraction, so that states die. The recurrent block of
    a plain layer gets ``recurrent_gain``; those of gates, and constrained ones, gain one. Biases are those of
    :func:`remember`.
    """
    gates = 1
    for name, hooks in module.parametrizations.items() if is_parametrized(module) else ():  # type: ignore[operator, union-attr]
        if all(p.requires_grad for p in hooks.parameters()):
            gates = max(gates, _fill_constrained(module, name, draw))
    for name, parameter in module.named_parameters(recurse=False):
        if not name.startswith("weight") or not parameter.requires_grad:
            continue
        blocks = stacked_blocks(module, name, parameter.shape[0])
        gates = max(gates, blocks)
        recurrent = name.startswith("weight_hh")
        for block in parameter.detach().chunk(blocks):
            draw.matrix(block, recurrent_gain if recurrent and not is_gated(module) else 1.0)
    remember(module, horizon, draw)
    if not is_gated(module):
        return f"per layer, recurrent gain {recurrent_gain:.6g}"
    return f"{gates} gates each on their own, biases that hold the state over {horizon} steps"


def _fill_constrained(module: nn.Module, name: str, draw: Draw) -> int:
    """Assign a fresh draw, from which the constraint takes what it allows; returns the number of blocks."""
    with torch.no_grad():
        target = torch.empty_like(getattr(module, name).detach())
        blocks = stacked_blocks(module, name, target.shape[0])
        for block in target.chunk(blocks):
            block.div_(draw.matrix(block, 1.0))  # without growth, which an orthogonal weight cannot have
        setattr(module, name, target)
    return blocks


def remember(module: nn.Module, horizon: int, draw: Draw, lower_input_gate: bool = True) -> None:
    """Set all biases to zero but those that let the state of LSTM and GRU layers last ``horizon`` steps.

    A unit whose forget gate (update gate of a GRU) has the bias ``ln(T − 1)`` keeps ``f = 1 − 1/T`` of its cell in a
    step, where inputs and state add nothing, so ``f^horizon ≈ exp(−horizon/T)`` over the horizon. The times ``T`` are
    spread evenly over ``(2, 10 · horizon)``, in random order: most units keep more than half, one in ten forgets faster
    than the horizon, and the root mean square of ``f^horizon`` is ``√∫₀¹ exp(−0.2/x) dx = 0.76``, at every horizon. The
    hidden half of an LSTM's state is read from the cell and not kept by itself, which leaves the rms singular value of
    ``∂(h, c)_horizon/∂(h, c)₀`` at 0.61; inputs of size one lower it to 0.54 (GRU: 0.79 and 0.68).

    The input gate of an LSTM gets the negative bias. Then a unit that keeps ``1 − 1/T`` of its cell takes in ``1/T``,
    and the state can neither die nor grow. With the input gate at one half the cell feeds back on itself instead; see
    the page "Depth".

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, where the longest ``T`` is the
    horizon itself: of the state only a tenth is left then, since the median unit keeps ``e⁻²``.
    """
    for name, bias in module.named_parameters(recurse=False):
        if not name.startswith("bias") or not bias.requires_grad or bias.is_meta:
            continue
        with torch.no_grad():
            bias.zero_()
            if name.startswith("bias_ih") and is_gated(module):
                blocks = bias.chunk(4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3)
                noise = torch.empty_like(blocks[1], dtype=torch.float64)
                draw.uniform(noise, 0.0, 1.0)
                share = (noise.argsort().double() + 0.5) / max(len(noise), 1)
                blocks[1].copy_((1.0 + (_LONGEST * horizon - 2.0) * share).log())
                if len(blocks) == 4 and lower_input_gate:
                    blocks[0].copy_(-blocks[1])


def check_horizon(horizon: object) -> None:
    """Raise unless ``horizon`` is an integer of at least 1."""
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(f"horizon must be an integer, got {horizon!r}")
    if horizon < 1:
        raise ValueError(f"horizon must be an integer of at least 1 step, got {horizon!r}")


def own_activation(module: nn.Module) -> str:
    """What a plain recurrent layer applies: ``"tanh"`` or ``"relu"``."""
    return str(getattr(module, "nonlinearity", "tanh"))
