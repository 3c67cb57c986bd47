"""Starting values for recurrent layers, gate by gate."""

import torch
from torch import nn

from orthogonium.initialization._filling import Draw
from orthogonium.parametrizations.torch_weights import stacked_blocks

HORIZON = 100  # time steps, where nothing else is asked


def is_gated(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM | nn.LSTMCell | nn.GRU | nn.GRUCell)


def initialize_recurrent(module: nn.Module, draw: Draw, recurrent_gain: float, horizon: int = HORIZON) -> str:
    """Fill every matrix of a recurrent layer, each gate's block on its own, and every bias; says what it did.

    An orthogonal matrix of all gates stacked leaves each gate a contraction, so that states die. The recurrent block of
    a plain layer gets ``recurrent_gain``; those of gates gain one. Biases are those of :func:`remember`.
    """
    gates = 1
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
    return f"{gates} gates each on their own, biases that remember up to {horizon} steps"


def remember(module: nn.Module, horizon: int, draw: Draw, lower_input_gate: bool = True) -> None:
    """Set all biases to zero but those that make units of LSTM and GRU layers remember for 1 to ``horizon`` steps.

    The forget gate of an LSTM and the update gate of a GRU get ``ln U(1, horizon − 1)``; the input gate of an LSTM the
    negative of that. Then a unit that keeps ``1 − 1/T`` of its cell takes in ``1/T``, and the state can neither die nor
    grow. With the input gate at one half the cell feeds back on itself instead; see the page "Depth".

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """
    for name, bias in module.named_parameters(recurse=False):
        if not name.startswith("bias") or not bias.requires_grad or bias.is_meta:
            continue
        with torch.no_grad():
            bias.zero_()
            if name.startswith("bias_ih") and is_gated(module):
                blocks = bias.chunk(4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3)
                draw.uniform(blocks[1], 1.0, horizon - 1.0)
                blocks[1].log_()
                if len(blocks) == 4 and lower_input_gate:
                    blocks[0].copy_(-blocks[1])


def check_horizon(horizon: object) -> None:
    """Raise unless ``horizon`` is an integer of at least 3."""
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(f"horizon must be an integer, got {horizon!r}")
    if horizon < 3:
        raise ValueError(f"horizon must be an integer of at least 3 steps, got {horizon!r}")


def own_activation(module: nn.Module) -> str:
    """What a plain recurrent layer applies: ``"tanh"`` or ``"relu"``."""
    return str(getattr(module, "nonlinearity", "tanh"))
