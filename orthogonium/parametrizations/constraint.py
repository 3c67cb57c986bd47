"""The one hook that layers register: normaliser, orthogonaliser, and when to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthogonium.linalg import NonFiniteError
from orthogonium.linalg._precision import differentiates_forward, raise_if_not_finite
from orthogonium.parametrizations._evaluation import Evaluation
from orthogonium.parametrizations._unseen_changes import HookBuffers, Seen, are_current, watch_optimizers
from orthogonium.parametrizations.checkpoint_format import checkpoint_code
from orthogonium.parametrizations.closed_form import closed_form
from orthogonium.parametrizations.compiled_evaluation import enrol, enrolled, remembered_weight, wants_values_alone
from orthogonium.parametrizations.normalizers import BatchedIdentity
from orthogonium.parametrizations.orthogonalizers import Orthogonalization


class _Traits(NamedTuple):
    """What every evaluation asks of the hooks."""

    buffers: HookBuffers
    refuses_nan: bool


class Constraint(nn.Module):
    """A free tensor becomes a weight: ``orthogonalizer(normalizer(free))``, computed no more often than needed.

    Where several free tensors stand behind one weight, the normaliser acts on the first of them.

    - In evaluation mode once, until the free tensor changes (in-place operations of torch are noticed; writes through
      ``.data`` only at the next switch of mode).
    - In training mode once for all readers of one forward pass, and anew after each backward pass.
    - Compiled evaluation without gradients looks the remembered weight up at run time: see `compiled_evaluation`.
    - Otherwise inside ``torch.compile``, in ``torch.export``, ``torch.func`` transforms, for tensor subclasses and
      where a hook has parameters of its own, at each reading.

    A normaliser in front of a scale-invariant orthogonaliser changes neither weight nor gradient, and is not run.

    Args:
        normalizer: ``(..., m, n)`` to the same shape.
        orthogonalizer: likewise.
        label: what error messages call the weight.

    Raises:
        NonFiniteError: (a ``ValueError``) when the free tensor holds NaN or Inf. On a CPU at once. On a GPU, which is
            not waited for, an orthogonaliser that reads numbers back finds it at once and the others let NaN through.
    """

    def __init__(self, normalizer: nn.Module, orthogonalizer: nn.Module, label: str = "weight") -> None:
        super().__init__()
        self.normalizer, self.orthogonalizer, self.label = normalizer, orthogonalizer, label
        # an evaluation, the position of this weight in it, and the buffers of the hooks then
        self._evaluation: tuple[Evaluation, int, Seen] | None = None
        self._traits: _Traits | None = None  # of the hooks, as long as nothing is forgotten
        self._group: Any = None  # set by FusedConstraints; it refers to its members weakly
        self._learns = _has_parameters(orthogonalizer) or (self._normalizes and _has_parameters(normalizer))
        self._enrol()

    def _enrol(self) -> None:
        self.number = enrol(self)  # by which compiled code finds it

    @property
    def _normalizes(self) -> bool:
        if type(self.normalizer) is BatchedIdentity:
            return False
        return not getattr(self.orthogonalizer, "scale_invariant", False)

    def compute(self, *originals: Tensor) -> Tensor:
        """The weight, from scratch."""
        return _pipeline(self.normalizer if self._normalizes else None, self.orthogonalizer, originals)

    def forward(self, *originals: Tensor) -> Tensor:
        try:
            if self._learns:
                return self.compute(*originals)
            if _must_recompute(originals):
                if self.is_looked_up(originals):
                    return remembered_weight(list(originals), self.number, list(self._weight_shape(originals[0])))
                return self.compute(*originals)
            evaluation, position = self.current(originals)
            return evaluation.weight(position)
        except NonFiniteError as error:
            raise self._named(error) from None

    def _named(self, error: NonFiniteError) -> NonFiniteError:
        text = str(error).removeprefix("matrix ").removeprefix("weight ")
        return NonFiniteError(f"{self.label} {text}")

    def _weight_shape(self, original: Tensor) -> tuple[int, ...]:
        plan = getattr(self.orthogonalizer, "plan", None)
        return tuple(original.shape) if plan is None else tuple(plan.weight_shape)

    def remembered_value(self, originals: Sequence[Tensor]) -> Tensor | None:
        """What :meth:`forward` gives in evaluation without gradients, if it is at hand and nobody traces.

        The very tensors that it was made from are the ones that were looked at then: wrapped or dual ones are others.
        """
        known = self._evaluation
        if known is None or self.training or not known[0].is_current(known[1], originals) or not are_current(known[2]):
            return None
        return known[0].value(known[1]).detach()

    def is_looked_up(self, originals: Sequence[Tensor]) -> bool:
        """Whether the operators of compiled evaluation may serve this weight to the code that is being traced."""
        return not self.training and not self._learns and wants_values_alone(originals)

    def current(self, originals: Sequence[Tensor], alias: bool = False) -> tuple[Evaluation, int]:
        """The evaluation that holds this weight, and where in it; anew if what is remembered does not hold any more."""
        known = self._evaluation  # read once: another thread may forget it
        if known is not None:
            evaluation, position, buffers = known
            current = evaluation.is_current(position, originals, alias) and are_current(buffers)
            if current and self._may_reuse(evaluation, position):
                return evaluation, position
        if self._group is not None and self._group.evaluate(self, originals):
            known = self._evaluation
            if known is not None:
                return known[:2]
        normalizer = self.normalizer if self._normalizes else None
        orthogonalizer = self.orthogonalizer  # not self: the evaluation must not hold its holder

        def compute(free: list[Tensor]) -> list[Tensor]:
            return [_pipeline(normalizer, orthogonalizer, free)]

        if not self._known_traits().refuses_nan:
            for original in originals:
                if original.device.type == "cpu":
                    raise_if_not_finite("weight", original.detach())
        keep_graph = self.training and torch.is_grad_enabled()
        direct = None if normalizer is not None else closed_form(orthogonalizer)
        made = Evaluation(compute, [originals], keep_graph, direct)
        self.remember(made, 0)
        return made, 0

    def remember(self, evaluation: Evaluation, position: int) -> None:
        """Take the weight at ``position`` of ``evaluation``, which has just been made."""
        known = evaluation, position, self._known_traits().buffers.now()
        self.__dict__["_evaluation"] = known  # past a method of torch that looks for parameters

    def _known_traits(self) -> _Traits:
        traits = self._traits
        if traits is None:
            normalizes = self._normalizes and not self.training  # in training, reading moves its state
            buffers = HookBuffers((self.orthogonalizer, *((self.normalizer,) if normalizes else ())))
            hook = getattr(self.orthogonalizer, "matrix_hook", self.orthogonalizer)
            self._traits = traits = _Traits(buffers, isinstance(hook, Orthogonalization))
        return traits

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
        if not isinstance(weight, Tensor):
            raise TypeError(f"{self.label} must be a tensor, got {weight!r}")
        self._check_dtype_of_base(weight)
        self.forget()
        with torch.no_grad():
            try:
                free = _inverse(self.orthogonalizer, weight)
                if isinstance(free, tuple):
                    return (_apart(_inverse(self.normalizer, free[0]), weight), *free[1:])
                return _apart(_inverse(self.normalizer, free), weight)
            except NonFiniteError as error:
                raise self._named(error) from None

    def _check_dtype_of_base(self, weight: Tensor) -> None:
        """Torch refuses another dtype after this hook has been called, and so after the base has moved."""
        hook = getattr(self.orthogonalizer, "matrix_hook", self.orthogonalizer)
        base = getattr(hook, "base", None)
        if isinstance(base, Tensor) and base.dtype != weight.dtype and weight.is_floating_point():
            raise ValueError(
                f"{self.label} must be {base.dtype}, got {weight.dtype}. Convert it with weight.to({base.dtype})."
            )

    def matrix_right_inverse(self, matrix: Tensor) -> Tensor:
        """The first free tensor for an orthogonal matrix: all of a weight that is a matrix, one part of a kernel."""
        self.forget()
        with torch.no_grad():
            hook = getattr(self.orthogonalizer, "matrix_hook", self.orthogonalizer)
            return _apart(_inverse(self.normalizer, _inverse(hook, matrix)), matrix)

    def forget(self) -> None:
        """Compute anew at the next reading, for whoever has written where nobody could notice."""
        self._evaluation = self._traits = None

    def train(self, mode: bool = True) -> Constraint:
        self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Constraint:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        """What the free tensor means, for whoever loads it: a number that survives averaging and any dtype."""
        return torch.tensor(float(checkpoint_code(self.orthogonalizer)))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore; a checkpoint of another method has been translated before."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_evaluation": None, "_traits": None, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enrol()


def _pipeline(normalizer: nn.Module | None, orthogonalizer: nn.Module, originals: Sequence[Tensor]) -> Tensor:
    first = originals[0] if normalizer is None else normalizer(originals[0])
    weight: Tensor = orthogonalizer(first, *originals[1:])
    return weight


def _has_parameters(hook: nn.Module) -> bool:
    return next(hook.parameters(), None) is not None


def _apart(free: Tensor, weight: Tensor) -> Tensor:
    """``free`` in memory of its own: torch makes the free tensor share what it is given."""
    return free.clone() if free.untyped_storage()._cdata == weight.untyped_storage()._cdata else free


def _inverse(hook: nn.Module, weight: Tensor) -> Any:
    inverse: Any = getattr(hook, "right_inverse", None)
    return weight if inverse is None else inverse(weight)


def _must_recompute(originals: Sequence[Tensor]) -> bool:
    """Whether somebody traces, transforms or wraps tensors, so that a remembered weight would be wrong."""
    if torch.compiler.is_compiling() or differentiates_forward() or torch.jit.is_tracing():
        return True
    return any(not _is_watched(free) or free.is_meta or free.is_inference() for free in originals)


def _is_watched(original: Tensor) -> bool:
    """Whether changes of this tensor are noticed: who differentiates a plain one, as ``gradcheck``, may hide them."""
    return type(original) is nn.Parameter or (type(original) is Tensor and not original.requires_grad)


def _remembered_free_tensors() -> Iterator[Tensor]:
    for constraint in enrolled():
        known = constraint._evaluation
        if known is not None:
            yield from known[0].originals


watch_optimizers(_remembered_free_tensors)
