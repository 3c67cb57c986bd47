"""Operators by which compiled code looks remembered weights up when it runs, in evaluation without gradients.

Compiled code may write into whatever an operator hands out, its own temporaries as it sees them. So a weight is handed
out as a copy; a product with it need not be one.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orthogonium._version import __version__
from orthogonium.linalg._opaque import DECIDES_ON_THE_HOST
from orthogonium.parametrizations._evaluation import Evaluation

# where torch cannot tell, every traced program might be an exported one
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)


class _Holder(Protocol):
    def current(self, originals: Sequence[Tensor], alias: bool = False) -> tuple[Evaluation, int]: ...


_numbers = itertools.count()
_holders: weakref.WeakValueDictionary[int, _Holder] = weakref.WeakValueDictionary()


def enrol(holder: _Holder) -> int:
    """A number by which the operators know who remembers a weight."""
    number = next(_numbers)
    _holders[number] = holder
    return number


def enrolled() -> list[Any]:
    """All of them that are alive."""
    return list(_holders.values())


def wants_values_alone(originals: Sequence[Tensor]) -> bool:
    """Whether compiled code, not an exported program that outlives this process, reads the weight for its value.

    The weight of a module, that is: what ``torch.func`` puts in place of a :class:`Parameter` may be many at a time.
    """
    if not torch.compiler.is_compiling() or _is_exporting():
        return False
    if any(type(original) is not nn.Parameter for original in originals):
        return False
    return not (torch.is_grad_enabled() and any(original.requires_grad for original in originals))


def _weight(originals: list[Tensor], number: int, shape: list[int]) -> Tensor:
    evaluation, position = _holders[number].current(originals, alias=True)
    return evaluation.value(position).clone(memory_format=torch.contiguous_format)  # as the fake one says


def _product(inputs: Tensor, bias: Tensor | None, original: Tensor, number: int) -> Tensor:
    """Few calls: between two products of matrices each of them comes from memory and not from a cache."""
    evaluation, position = _holders[number].current((original,), alias=True)
    factor = evaluation.factor(position)
    if bias is None and inputs.ndim == 2:
        return torch.mm(inputs, factor)
    return nn.functional.linear(inputs, factor.mT, bias)


# Declared by hand: the wrapper of `torch.library.custom_op` costs as much again.
_NAMESPACE = f"orthogonium_{__version__.replace('.', '_')}"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
for _schema in (
    "remembered(Tensor[] originals, int number, int[] shape) -> Tensor",
    "remembered_product(Tensor inputs, Tensor? bias, Tensor original, int number) -> Tensor",
):
    _library.define(_schema, tags=DECIDES_ON_THE_HOST)
_library.impl("remembered", _weight, "CompositeExplicitAutograd")
_library.impl("remembered_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{_NAMESPACE}::remembered", lib=_library)
def _fake_weight(originals: list[Tensor], number: int, shape: list[int]) -> Tensor:
    return originals[0].new_empty(shape)


@torch.library.register_fake(f"{_NAMESPACE}::remembered_product", lib=_library)
def _fake_product(inputs: Tensor, bias: Tensor | None, original: Tensor, number: int) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], original.shape[0]))


def _batched_product(
    info: Any, in_dims: tuple[Any, ...], inputs: Tensor, bias: Tensor | None, original: Tensor, number: int
) -> tuple[Tensor, int]:
    """Any number of leading dimensions will do."""
    of_inputs, of_bias, *_ = in_dims
    inputs = inputs.expand(info.batch_size, *inputs.shape) if of_inputs is None else inputs.movedim(of_inputs, 0)
    if bias is None or of_bias is None:
        return remembered_product(inputs, bias, original, number), 0
    product = remembered_product(inputs, None, original, number)
    bias = bias.movedim(of_bias, 0)
    return product + bias.view(len(bias), *(1,) * (product.ndim - 2), product.shape[-1]), 0


torch.library.register_vmap(f"{_NAMESPACE}::remembered_product", _batched_product, lib=_library)

remembered_weight = getattr(torch.ops, _NAMESPACE).remembered
remembered_product = getattr(torch.ops, _NAMESPACE).remembered_product
