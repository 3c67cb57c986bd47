"""Weights computed once, handed out many times: the bookkeeping between a free tensor and its readers.

An `Evaluation` is the weights made from one state of one or several free tensors. Readers that need no gradient get the
values; the others share one autograd node, whose backward pass goes through the reverse of the computation: one in
closed form where there is one, else a private graph from the free tensors to the weights. It is freed after use like
any graph, and made again from the same free tensors when it is needed once more (a second loss on the same forward
pass, or evaluation mode, where none is kept).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from orthogonium.linalg._functions import apply
from orthogonium.linalg._precision import is_vectorized
from orthogonium.parametrizations._layout import by_columns

Compute = Callable[[list[Tensor]], list[Tensor]]
# gradients of the weights, None where one was not used, to those of the free tensors
Reverse = Callable[[Sequence[Tensor | None]], list[Tensor | None]]
ComputeWithReverse = Callable[[list[Tensor]], tuple[list[Tensor], Reverse]]


class _Pullback:
    """The way back. It refers neither to the node nor to the module, so that nothing holds itself alive."""

    def __init__(
        self, compute: Compute, originals: list[Tensor], spans: list[range], direct: ComputeWithReverse | None
    ) -> None:
        self.compute, self.originals, self.spans, self.direct = compute, originals, spans, direct
        self.memory = [t.detach() for t in originals]  # held, so that no other tensor takes its address
        self.versions = [t._version for t in originals]
        self.reverse: Reverse | None = None
        self.flags: list[bool] = []  # which of them the reverse gives gradients for
        self.used = False

    def build(self) -> tuple[list[Tensor], Reverse]:
        """The weights, and the reverse for one backward pass."""
        self.flags = [t.requires_grad for t in self.originals]
        if self.direct is not None:
            with torch.no_grad():
                return self.direct(self.memory)
        leaves = [t.detach().requires_grad_(flag) for t, flag in zip(self.memory, self.flags, strict=True)]
        with torch.enable_grad(), _unhooked():
            values = self.compute(leaves)
        return values, lambda grads: self._selected(leaves, values, grads, create_graph=False)

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        self.used = True
        if [t._version for t in self.originals] != self.versions:
            raise RuntimeError(
                "a constrained weight was used in a forward pass, and its free tensor was changed in place before the "
                "backward pass. Call backward() before optimizer.step(), or read the weight again."
            )
        if self.direct is not None and any(g is not None and is_vectorized(g) for g in grads):
            return self._through(self.originals, grads, create_graph=False)
        reverse, self.reverse = self.reverse, None
        if reverse is None or (self.direct is None and self.flags != [t.requires_grad for t in self.originals]):
            _, reverse = self.build()
        return reverse(grads)

    def differentiable_gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        self.used = True
        return self._through(self.originals, grads, create_graph=True)

    def _through(
        self, originals: list[Tensor], grads: Sequence[Tensor | None], create_graph: bool
    ) -> list[Tensor | None]:
        """By a graph made for the occasion."""
        with torch.enable_grad():
            values = self.compute(originals)
        return self._selected(originals, values, grads, create_graph)

    def _selected(
        self, leaves: list[Tensor], values: list[Tensor], grads: Sequence[Tensor | None], create_graph: bool
    ) -> list[Tensor | None]:
        """Gradients of the leaves whose weights took part; the others get ``None`` and not zeros."""
        chosen = [i for i, g in enumerate(grads) if g is not None and values[i].requires_grad]
        wanted = [j for i in chosen for j in self.spans[i] if leaves[j].requires_grad]
        result: list[Tensor | None] = [None] * len(leaves)
        if wanted:
            found = torch.autograd.grad(
                [values[i] for i in chosen],
                [leaves[j] for j in wanted],
                [grads[i] for i in chosen],
                create_graph=create_graph,
                allow_unused=True,
            )
            for j, gradient in zip(wanted, found, strict=True):
                result[j] = gradient
        return result


def _unhooked() -> Any:
    """Keep the private graph from hooks that count saved tensors, such as those of activation checkpointing."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t)


def _is_shared(tensor: Tensor) -> bool:
    """Whether other processes may write into this tensor, whose version counters are their own."""
    return tensor.device.type == "cpu" and tensor.is_shared()


class _Handout(Function):
    """Weights that exist already, with a derivative that is computed when it is asked for."""

    @staticmethod
    def forward(ctx: Any, pullback: _Pullback, values: list[Tensor], *originals: Tensor) -> tuple[Tensor, ...]:
        ctx.pullback = pullback
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pullback: _Pullback = ctx.pullback
        if torch.is_grad_enabled():
            return None, None, *pullback.differentiable_gradients(grads)
        return None, None, *pullback.gradients(grads)


class _Snapshot:
    """One free tensor as it was when the weight was made."""

    __slots__ = ("copied", "pointer", "strides", "tensor", "version")

    def __init__(self, tensor: Tensor, keep_copy: bool) -> None:
        self.tensor, self.version = tensor, tensor._version
        self.pointer, self.strides = tensor.data_ptr(), tensor.stride()
        self.copied = tensor.detach().clone() if keep_copy and _is_shared(tensor) else None

    def holds(self, tensor: Tensor, alias: bool) -> bool:
        """Whether ``tensor`` is this one, unchanged."""
        mine = self.tensor
        if mine is not tensor and not (alias and mine.shape == tensor.shape and mine.dtype == tensor.dtype):
            return False
        if tensor._version != self.version or tensor.data_ptr() != self.pointer or tensor.stride() != self.strides:
            return False
        return self.copied is None or torch.equal(self.copied, tensor)


class Evaluation:
    """The weights made from one state of some free tensors.

    Args:
        compute: a list of free tensors to the list of weights; must not refer to the holder of this object.
        originals: for each weight, the free tensors behind it.
        keep_graph: build the way back at once, as training needs; otherwise only when a gradient is asked for.
        direct: the same as ``compute``, on tensors whose operations are not recorded, with its reverse.
    """

    def __init__(
        self,
        compute: Compute,
        originals: Sequence[Sequence[Tensor]],
        keep_graph: bool,
        direct: ComputeWithReverse | None = None,
    ) -> None:
        flat: list[Tensor] = []
        spans: list[range] = []
        for group in originals:
            flat += group
            spans.append(range(len(flat) - len(group), len(flat)))
        self._pullback = _Pullback(compute, flat, spans, direct)
        # in training, a weight is kept for one pass alone
        taken = [_Snapshot(t, keep_copy=not keep_graph) for t in flat]
        self._snapshots = [taken[span.start : span.stop] for span in spans]
        self._flags: list[bool] = []  # which of them required a gradient when the shared node was made
        self._shared: tuple[Tensor, ...] | None = None
        self._unread = set(range(len(originals)))
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if keep_graph and any(t.requires_grad for t in flat):
                values, self._pullback.reverse = self._pullback.build()
                self._values = [value.detach() for value in values]
            else:
                with torch.no_grad():  # row-major, as what reads, exports and saves a weight expects it
                    self._values = [value.detach().contiguous() for value in compute(flat)]
        self._value_versions = [value._version for value in self._values]
        self._factors: dict[int, Tensor] = {}

    @property
    def originals(self) -> list[Tensor]:
        """All the free tensors."""
        return self._pullback.originals

    def is_current(self, position: int, originals: Sequence[Tensor], alias: bool = False) -> bool:
        """Whether the weight at ``position`` was made from ``originals`` as they are now, and is untouched itself.

        ``alias``: other tensors over the same memory will do, as compiled code passes them; not where gradients flow.
        Every layer asks between two products of an evaluation, so it is a loop: a generator costs half a microsecond.
        """
        if self._values[position]._version != self._value_versions[position]:
            return False
        for snapshot, original in zip(self._snapshots[position], originals, strict=True):
            if not snapshot.holds(original, alias):
                return False
        return True

    def serves_training(self, position: int) -> bool:
        """Whether this weight belongs to the forward pass under way: not yet read, or not yet differentiated."""
        if position in self._unread:
            return True
        return torch.is_grad_enabled() and self._shared is not None and not self._pullback.used

    def value(self, position: int) -> Tensor:
        """The weight without a gradient: the tensor itself, to be read only."""
        return self._values[position]

    def factor(self, position: int) -> Tensor:
        """``Wᵀ`` of a weight that is a matrix, without a gradient, where products ``x Wᵀ`` like it; to be read only."""
        known = self._factors.get(position)
        if known is None:
            known = self._factors[position] = by_columns(self._values[position]).mT
        return known

    def weight(self, position: int) -> Tensor:
        """The weight, on the shared node where gradients are recorded."""
        self._unread.discard(position)
        originals, span = self._pullback.originals, self._pullback.spans[position]
        flags = [originals[j].requires_grad for j in span]
        if not (torch.is_grad_enabled() and any(flags)):
            return self._values[position].detach()
        if self._shared is None or self._pullback.used or flags != self._flags[span.start : span.stop]:
            self._pullback.used = False
            self._flags = [original.requires_grad for original in originals]
            self._shared = apply(_Handout, self._pullback, self._values, *self._pullback.originals)
        return self._shared[position]
