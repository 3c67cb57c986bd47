"""One batched orthogonalisation for all weights of a shape, instead of one each."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.parametrizations._evaluation import Evaluation
from orthogonium.parametrizations.constraint import Constraint
from orthogonium.parametrizations.orthogonalizers import Orthogonalization


class _Group:
    """Constraints that the same call can serve: same hook, same arguments, same shape, dtype and device."""

    def __init__(self, members: list[tuple[nn.Module, Constraint]]) -> None:
        self._members = [(weakref.ref(owner), weakref.ref(constraint)) for owner, constraint in members]

    def evaluate(self, asking: Constraint, originals: Sequence[Tensor]) -> bool:
        """Give every member its weight. ``False`` where the group does not stand as it was registered."""
        members: list[tuple[Constraint, Tensor]] = []
        for owner_ref, constraint_ref in self._members:
            owner, constraint = owner_ref(), constraint_ref()
            if owner is None or constraint is None or not isinstance(owner.original, Tensor):
                return False
            free = owner.original
            assert isinstance(free, Tensor)
            members.append((constraint, free))
        reference = members[0][1]
        if not any(c is asking and free is originals[0] for c, free in members):
            return False
        for constraint, free in members:
            same = free.shape == reference.shape and free.dtype == reference.dtype
            same = same and free.device == reference.device and constraint.training == asking.training
            if not same:
                return False
        hooks = [constraint.orthogonalizer for constraint, _ in members]

        def compute(free: list[Tensor]) -> list[Tensor]:
            first = hooks[0]
            assert isinstance(first, Orthogonalization)
            peers = [hook for hook in hooks if isinstance(hook, Orthogonalization)]
            return list(first.orthogonalize_stack(peers, torch.stack(free)).unbind(0))

        keep_graph = asking.training and torch.is_grad_enabled()
        evaluation = Evaluation(compute, [[free] for _, free in members], keep_graph)
        for position, (constraint, _) in enumerate(members):
            constraint.remember(evaluation, position)
        return True


def _is_fusible(constraint: Constraint, hook: Orthogonalization) -> bool:
    """Whether one hook can speak for several: what it keeps in tensors is at most the base that a stack has, too."""
    kept = {name for name, _ in hook.named_buffers()} | {name for name, _ in hook.named_parameters()}
    return kept <= {"base"} and next(hook.children(), None) is None and not constraint._normalizes_state()


_PLAIN = (bool, int, float, str, tuple, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _arguments(hook: Orthogonalization) -> Any:
    """The attributes of a hook; those that cannot be compared make it unlike any other."""
    own = ((name, value) for name, value in vars(hook).items() if name not in _OF_EVERY_MODULE)
    return tuple((name, value if isinstance(value, _PLAIN) else id(value)) for name, value in sorted(own))


class FusedConstraints:
    """The groups that :func:`orthogonium.fused` made; ``remove()`` undoes it, as does leaving it as a context.

    Attributes:
        sizes: the number of weights in each group.
    """

    def __init__(self, parametrized: Iterable[tuple[nn.Module, Constraint]]) -> None:
        found: dict[Any, list[tuple[nn.Module, Constraint]]] = defaultdict(list)
        for owner, constraint in parametrized:
            hook, free = constraint.orthogonalizer, getattr(owner, "original", None)
            if isinstance(hook, Orthogonalization) and isinstance(free, Tensor) and _is_fusible(constraint, hook):
                key = (type(hook), _arguments(hook), free.shape, free.dtype, free.device)
                found[key].append((owner, constraint))
        self._groups = [_Group(members) for members in found.values() if len(members) > 1]
        self._constraints = [[c for _, c in members] for members in found.values() if len(members) > 1]
        for group, constraints in zip(self._groups, self._constraints, strict=True):
            for constraint in constraints:
                constraint._group = group

    @property
    def sizes(self) -> list[int]:
        return [len(constraints) for constraints in self._constraints]

    def __iter__(self) -> Iterator[list[Constraint]]:
        return iter(self._constraints)

    def remove(self) -> None:
        """Let every weight be computed on its own again."""
        for constraint in (c for constraints in self._constraints for c in constraints):
            constraint._group = None
            constraint.forget()
        self._groups, self._constraints = [], []

    def __enter__(self) -> "FusedConstraints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"FusedConstraints(sizes={self.sizes})"
