"""Starting values for recurrent layers, gate by gate."""

import torch
from torch import Tensor, nn

from orthogonium.initialization._filling import Draw

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
HORIZON = 100  # time steps, where nothing else is asked


def is_gated(module: nn.Module) -> bool:
    return _kind(module) in _GATES


def initialize_recurrent(module: nn.Module, draw: Draw, recurrent_gain: float, horizon: int = HORIZON) -> str:
    """Fill every matrix of a recurrent layer, each gate's block on its own, and every bias; says what it did.

    An orthogonal matrix of all gates stacked leaves each gate a contraction, so that states die. The recurrent block of
    a plain layer gets ``recurrent_gain``; those of gates gain one. Biases are zero but for chrono initialisation, which
    makes gates of a gated layer remember up to ``horizon`` steps, evenly in the logarithm.

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, for the biases.
    """
    gates = _GATES.get(_kind(module), 1)
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.requires_grad:
            continue
        with torch.no_grad():
            if name.startswith("weight_h") and not name.startswith("weight_hr"):
                for block in parameter.chunk(gates):
                    draw.matrix(block, recurrent_gain if gates == 1 else 1.0)
            elif name.startswith("weight"):
                for block in parameter.chunk(1 if name.startswith("weight_hr") else gates):
                    draw.matrix(block, 1.0)
            else:
                parameter.zero_()
                if name.startswith("bias_ih") and gates > 1:
                    _chrono(parameter, gates, horizon, draw)
    if gates == 1:
        return f"per layer, recurrent gain {recurrent_gain:.6g}"
    return f"{gates} gates each on their own, biases that remember up to {horizon} steps"


def _chrono(bias: Tensor, gates: int, horizon: int, draw: Draw) -> None:
    """Forget (LSTM: input, forget, cell, output) or update (GRU: reset, update, new) biases of ``ln U(1, T − 1)``."""
    blocks = bias.chunk(gates)
    draw.uniform(blocks[1], 1.0, max(horizon - 1.0, 1.0))
    blocks[1].log_()
    if gates == 4:
        blocks[0].copy_(-blocks[1])


def _kind(module: nn.Module) -> str:
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in _GATES), type(module).__name__)


def own_activation(module: nn.Module) -> str:
    """What a plain recurrent layer applies: ``"tanh"`` or ``"relu"``."""
    return str(getattr(module, "nonlinearity", "tanh"))
