"""Recurrent modules keep a list of their weights for cuDNN; under a constraint that list has to be read anew."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn


def read_weights_at_each_call(module: nn.RNNBase) -> None:
    """Make ``module``, some of whose weights are parametrized, compute with these.

    ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` hand a private list of parameters to their kernels. It is made once and would
    go on naming the free tensors; and ``flatten_parameters`` would move what it finds there into one block of memory,
    under the feet of whoever remembers a computed weight. In the class that torch made for this module the list is
    therefore a property, and flattening does nothing: cuDNN then copies the weights into a block in each call.
    """
    parametrized = type(module)
    if not isinstance(vars(parametrized).get("_flat_weights"), property):
        members: dict[str, Any] = {
            "_flat_weights": property(_current_weights, _ignore),
            "flatten_parameters": _keep_in_place,
            "_init_flat_weights": _forget,
            "_update_flat_weights": _keep_in_place,
        }
        for name, member in members.items():
            setattr(parametrized, name, member)
    vars(module)["_flat_weights"] = [None] * len(module._flat_weights_names)
    _forget(module)


def _current_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _ignore(module: nn.RNNBase, value: object) -> None:
    """Torch assigns the list where it moves or restores parameters."""


def _keep_in_place(module: nn.RNNBase) -> None:
    """Nothing to flatten and nothing to refresh."""


def _forget(module: nn.RNNBase) -> None:
    """References to weights that are gone: should the constraints be removed, torch makes the list again."""
    gone = weakref.ref(torch.empty(0))
    module._flat_weight_refs = [gone for _ in module._flat_weights_names]  # type: ignore[misc]
