"""Changes that torch's version counter of the free tensor does not show: of a hook's own state, and by fused steps."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_OWN_PACKAGE = __name__.partition(".")[0]


Seen = list[tuple[dict[str, Tensor | None], str, Tensor | None, int]]


class HookBuffers:
    """The buffers of some hooks, in any state: those that they have now, and those that they will be given."""

    def __init__(self, hooks: Iterable[nn.Module]) -> None:
        self._holders = [module._buffers for hook in hooks for module in hook.modules()]

    def now(self) -> Seen:
        """What :func:`are_current` compares with."""
        return [(held, name, t, _version(t)) for held in self._holders for name, t in held.items()]


def are_current(buffers: Seen) -> bool:
    """Whether they are the same tensors, and none has been written to since."""
    for held, name, tensor, seen in buffers:  # noqa: SIM110, a generator costs more than the few comparisons
        if held.get(name) is not tensor or _version(tensor) != seen:
            return False
    return True


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def count_steps(free_tensors: Iterator[Tensor], optimizer: Optimizer) -> None:
    """Count a step of an optimiser that might not do so itself as a change of those free tensors that it moves.

    Torch's fused kernels write without counting, and so may other optimisers. Where parameters are sharded, as by
    ``fully_shard``, the tensors that weights are made from are filled from them later, uncounted: all have changed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(type(p) is not nn.Parameter and is_traceable_wrapper_subclass(p) for p in parameters):
        increment_version(list(free_tensors))
        return
    foreign = type(optimizer).__module__.partition(".")[0] not in ("torch", _OWN_PACKAGE)
    groups = [group for group in optimizer.param_groups if foreign or group.get("fused")]
    if groups:
        moved = {id(parameter) for group in groups for parameter in group["params"]}
        increment_version([tensor for tensor in free_tensors if id(tensor) in moved])


def watch_optimizers(free_tensors: Any) -> None:
    """Count the steps of every optimiser; ``free_tensors()`` iterates over those that weights are remembered of."""

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            count_steps(free_tensors(), optimizer)

    register_optimizer_step_post_hook(after_step)
