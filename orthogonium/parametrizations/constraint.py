"""The one hook that layers register: normaliser, orthogonaliser, and when to compute."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium._version import __version__
from orthogonium.linalg import NonFiniteError
from orthogonium.linalg._precision import differentiates_forward
from orthogonium.parametrizations._evaluation import Evaluation
from orthogonium.parametrizations.checkpoint_format import checkpoint_code

# where torch cannot tell, every traced program might be an exported one
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)
_numbers = itertools.count()
_enrolled: weakref.WeakValueDictionary[int, Constraint] = weakref.WeakValueDictionary()


class Constraint(nn.Module):
    """A free tensor becomes a weight: ``orthogonalizer(normalizer(free))``, computed no more often than needed.

    - In evaluation mode once, until the free tensor changes (in-place operations of torch are noticed; writes through
      ``.data`` only at the next switch of mode).
    - In training mode once for all readers of one forward pass, and anew after each backward pass.
    - Compiled evaluation without gradients looks the remembered weight up at run time, and copies it.
    - Otherwise inside ``torch.compile``, in ``torch.export``, ``torch.func`` transforms and for tensor subclasses, at
      each reading.

    A normaliser in front of a scale-invariant orthogonaliser changes neither weight nor gradient, and is not run.

    Args:
        normalizer: ``(..., m, n)`` to the same shape.
        orthogonalizer: likewise.
        label: what error messages call the weight.

    Raises:
        NonFiniteError: (a ``ValueError``) when the free tensor holds NaN or Inf. On a CPU at once. On a GPU, which
        must not
            be waited for, an orthogonaliser that reads numbers back finds it at once and the others let NaN through.
    """

    def __init__(self, normalizer: nn.Module, orthogonalizer: nn.Module, label: str = "weight") -> None:
        super().__init__()
        self.normalizer, self.orthogonalizer, self.label = normalizer, orthogonalizer, label
        self._evaluation: tuple[Evaluation, int] | None = None  # and the position of this weight in it
        self._group: Any = None  # set by FusedConstraints; it refers to its members weakly
        self._enrol()

    def _enrol(self) -> None:
        self._number = next(_numbers)
        _enrolled[self._number] = self

    @property
    def _normalizes(self) -> bool:
        return not getattr(self.orthogonalizer, "scale_invariant", False)

    def compute(self, original: Tensor) -> Tensor:
        """The weight, from scratch."""
        return _pipeline(self.normalizer if self._normalizes else None, self.orthogonalizer, original)

    def forward(self, original: Tensor) -> Tensor:
        try:
            if _must_recompute(original):
                if not self.training and _compiles_without_gradient(original):
                    return _remembered(original, self._number)
                return self.compute(original)
            evaluation, position = self._current(original)
            return evaluation.weight(position)
        except NonFiniteError as error:
            raise self._named(error) from None

    def _named(self, error: NonFiniteError) -> NonFiniteError:
        text = str(error).removeprefix("matrix ").removeprefix("weight ")
        return NonFiniteError(f"{self.label} {text}")

    def _current(self, original: Tensor, alias: bool = False) -> tuple[Evaluation, int]:
        if self._evaluation is not None:
            evaluation, position = self._evaluation
            if evaluation.is_current(position, original, alias) and self._may_reuse(evaluation, position):
                return self._evaluation
        if self._group is None or not self._group.evaluate(self, original):
            normalizer = self.normalizer if self._normalizes else None
            orthogonalizer = self.orthogonalizer  # not self: the evaluation must not hold its holder

            def compute(free: list[Tensor]) -> list[Tensor]:
                return [_pipeline(normalizer, orthogonalizer, free[0])]

            keep_graph = self.training and torch.is_grad_enabled()
            self._evaluation = Evaluation(compute, [original], keep_graph), 0
        assert self._evaluation is not None
        return self._evaluation

    def _may_reuse(self, evaluation: Evaluation, position: int) -> bool:
        if not self.training:
            return True
        if self._normalizes_state():
            return True  # its state has moved on: a second reading would give other bits
        return evaluation.serves_training(position)

    def _normalizes_state(self) -> bool:
        """Whether reading the weight in training mode moves a normaliser's buffers."""
        return self._normalizes and next(self.normalizer.buffers(), None) is not None

    def right_inverse(self, weight: Tensor) -> Any:
        self._evaluation = None
        with torch.no_grad():
            free = weight
            for hook in (self.orthogonalizer, self.normalizer):
                inverse = getattr(hook, "right_inverse", None)
                try:
                    free = inverse(free) if inverse is not None else free
                except NonFiniteError as error:
                    raise self._named(error) from None
        return free

    def train(self, mode: bool = True) -> Constraint:
        self._evaluation = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Constraint:
        self._evaluation = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._evaluation = None
        super()._load_from_state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """What the free tensor means, for whoever loads it: a number that survives averaging and any dtype."""
        return torch.tensor(float(checkpoint_code(self.orthogonalizer)))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore; a checkpoint of another method has been translated before."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_evaluation": None, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enrol()


def _pipeline(normalizer: nn.Module | None, orthogonalizer: nn.Module, original: Tensor) -> Tensor:
    free = original if normalizer is None else normalizer(original)
    weight: Tensor = orthogonalizer(free)
    return weight


def _must_recompute(original: Tensor) -> bool:
    """Whether somebody traces, transforms or wraps tensors, so that a remembered weight would be wrong."""
    return (
        torch.compiler.is_compiling()
        or type(original) not in (Tensor, nn.Parameter)
        or differentiates_forward()
        or torch.jit.is_tracing()
        or original.is_meta
        or original.is_inference()
    )


def _compiles_without_gradient(original: Tensor) -> bool:
    """Whether compiled code, not an exported program that outlives this process, reads the weight for its value."""
    if not torch.compiler.is_compiling() or _is_exporting():
        return False
    return not (torch.is_grad_enabled() and original.requires_grad)


@torch.library.custom_op(f"orthogonium_{__version__.replace('.', '_')}::remembered", mutates_args=())
def _remembered(original: Tensor, number: int) -> Tensor:
    """The weight of the constraint of that number; a copy, since compiled code may write into what it was handed."""
    evaluation, position = _enrolled[number]._current(original, alias=True)
    with torch.no_grad():
        return evaluation.weight(position).clone()


@_remembered.register_fake
def _(original: Tensor, number: int) -> Tensor:
    return torch.empty_like(original)
