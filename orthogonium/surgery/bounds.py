"""The Lipschitz bound of a whole model, where there is one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from orthogonium.certification import lipschitz_bound


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; afterwards each is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # parents come first
            module.train(mode)


def network_bound(model: nn.Module, input_shape: Sequence[int] | None) -> tuple[float | None, str]:
    """A bound on the Lipschitz constant of ``model`` in evaluation mode, or ``None`` and the reason."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None, "the model is on the meta device, where weights have no values"
    try:
        with evaluating(model), torch.no_grad():
            return lipschitz_bound(model, input_shape).bound, ""
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, str(error)
