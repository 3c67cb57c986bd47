"""Parameter groups in which weight decay does no harm."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from orthogonium._selection import Selection, choice


def parameter_groups(
    model: nn.Module, weight_decay: float = 1e-2, *, manifold: Selection | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimiser: ordinary weights decay, and what must not decay does not.

    Without weight decay:

    - the free tensors behind parametrized weights (this library's and torch's): the weight does not shrink with them,
      or worse. Scale-invariant maps turn their decay into a growing learning rate, skew maps pull towards their base
      frame, and torch's Householder map returns the zero matrix after one step of decay on a matrix that is not
      square;
    - vectors and scalars: biases and the gains of norms;
    - matrices kept on the manifold.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> [len(group["params"]) for group in parameter_groups(model, weight_decay=0.1)]
    [2, 4]

    Args:
        model: its parameters, each once, frozen ones left out.
        weight_decay: of the ordinary weights.
        manifold: for the optimisers of ``orthogonium.optim``: which parameters to keep orthogonal, as name patterns
            (``"rnn.weight_hh*"``) or a function of name and parameter. Every group then says ``manifold`` true or
            false.

    Returns:
        Up to three groups, none of them empty, with their parameters in order.

    Raises:
        ValueError: ``weight_decay`` below zero; ``manifold`` matches nothing, a vector, or a free tensor behind a
            parametrized weight.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    free = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ParametrizationList)
        for parameter in module.parameters()
    }
    chosen = choice("manifold", manifold)
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if chosen([name], parameter):
            if parameter.ndim < 2 or id(parameter) in free:
                what = "the free tensor of a parametrized weight" if id(parameter) in free else "no matrix"
                raise ValueError(f"{name} of shape {tuple(parameter.shape)} is {what} and cannot be kept orthogonal")
            kept.append(parameter)
        else:
            (rest if parameter.ndim < 2 or id(parameter) in free else decayed).append(parameter)
    if manifold is not None and not kept:
        raise ValueError(f"manifold={manifold!r} matches no trainable parameter of {type(model).__name__}")
    plain = {} if manifold is None else {"manifold": False}
    groups: list[dict[str, Any]] = [
        {"params": kept, "weight_decay": 0.0, "manifold": True},
        {"params": decayed, "weight_decay": weight_decay, **plain},
        {"params": rest, "weight_decay": 0.0, **plain},
    ]
    return [group for group in groups if group["params"]]
