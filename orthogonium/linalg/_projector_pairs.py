"""Two-tap kernels ``[P, I − P]`` applied two at a time: few large products in place of many small ones.

Two of them along one axis, ``P₁`` first, have the three taps ``Π``, ``S − 2 Π`` and ``I − S + Π`` with ``Π = P₂ P₁``
and ``S = P₁ + P₂``. So ``S X`` and ``Π X`` are all that has to be multiplied, for all positions of a kernel ``X`` at
once, and a matrix of small integers takes ``X`` and its products to the positions of the longer kernel.

A kernel is ``(groups, positions, rows, columns)`` here. Projectors multiply its rows from the *left*, or its columns
from the right; the factors of a step are ``(groups, count, c, c)`` or, from the right, ``(count, groups, c, c)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

# Tap by tap (rows), what X and its products, S X and Π X or P X alone, contribute.
_PAIR = ((0.0, 0.0, 1.0), (0.0, 1.0, -2.0), (1.0, -1.0, 1.0))
_SINGLE = ((0.0, 1.0), (1.0, -1.0))


@dataclass(frozen=True)
class Step:
    """One or two taps along an axis.

    Attributes:
        count: how many.
        positions: of the kernel before.
        mix: ``(groups, new, old · (1 + count))``: from the positions of ``X``, then of its products, to those after.
            Done in each step: left to the last one, it would save a product and multiply the rounding error.
        unmix: its transpose.
    """

    count: int
    positions: int
    mix: Tensor
    unmix: Tensor


@dataclass(frozen=True)
class Steps:
    """All steps of a composition.

    Attributes:
        sequence: in the order in which they are applied.
        order: for each tap, as the steps count them (pairs, then single taps), which one it is; ``None`` if unchanged.
        groups: of channels.
        left: the side on which projectors act.
    """

    sequence: tuple[Step, ...]
    order: Tensor | None
    groups: int
    left: bool

    @cached_property
    def pairs(self) -> int:
        return sum(step.count == 2 for step in self.sequence)

    @cached_property
    def inverse_order(self) -> Tensor | None:
        return None if self.order is None else torch.argsort(self.order)


def plan_steps(
    axes: tuple[int, ...], sides: tuple[int, ...], groups: int, left: bool, dtype: torch.dtype, device: torch.device
) -> Steps:
    """The steps of the taps along ``axes``, sorted, on a kernel that begins with ``sides``."""
    # modes that replace tensors must not leave theirs in the cache
    make: Any = _plan_steps if torch._C._len_torch_dispatch_stack() == 0 else _plan_steps.__wrapped__
    steps: Steps = make(axes, sides, groups, left, dtype, device)
    return steps


@lru_cache(maxsize=256)
def _plan_steps(
    axes: tuple[int, ...], sides: tuple[int, ...], groups: int, left: bool, dtype: torch.dtype, device: torch.device
) -> Steps:
    found: list[Step] = []
    pairs: list[int] = []
    singles: list[int] = []
    done = 0
    with torch.inference_mode(False):
        while done < len(axes):
            axis = axes[done]
            count = 2 if axes[done : done + 2] == (axis, axis) else 1
            (pairs if count == 2 else singles).extend(range(done, done + count))
            keep, *products = _mixing(sides, axis, count)
            # from the left, the products of one position lie next to each other; from the right, those of one factor
            added = torch.stack(products, -1).flatten(1) if left else torch.cat(products, 1)
            mix = torch.cat((keep, added), 1).to(dtype=dtype, device=device)
            mixing = (t.unsqueeze(0).expand(groups, -1, -1) for t in (mix, mix.T.contiguous()))
            found.append(Step(count, prod(sides), *mixing))
            sides = (*sides[:axis], sides[axis] + count, *sides[axis + 1 :])
            done += count
        order = None if not pairs or not singles else torch.tensor(pairs + singles, device=device)
        return Steps(tuple(found), order, groups, left)


def _mixing(sides: tuple[int, ...], axis: int, count: int) -> list[Tensor]:
    """For ``X`` and each of its products, the matrix from old to new positions."""
    old = torch.arange(sides[axis])
    result = []
    for contributions in zip(*(_PAIR if count == 2 else _SINGLE), strict=True):
        along = torch.zeros(sides[axis] + count, sides[axis])
        for tap, weight in enumerate(contributions):
            along[old + tap, old] = weight
        before, after = prod(sides[:axis]), prod(sides[axis + 1 :])
        result.append(torch.kron(torch.kron(torch.eye(before), along), torch.eye(after)))
    return result


def compose(start: Tensor, frames: Tensor, steps: Steps) -> tuple[Tensor, list[Tensor]]:
    """A kernel after all steps.

    Args:
        start: ``(groups, positions, rows, columns)``.
        frames: ``(taps · groups, r, c)``, ``Uᵀ`` of each tap, orthonormal rows, in the order of ``steps``.
        steps: at least one.

    Returns:
        ``(groups, positions, rows · columns)``, and what :func:`compose_backward` needs: projectors, factors of
        pairs, and the kernel before each step.
    """
    groups = steps.groups
    projectors = torch.bmm(frames.mT, frames)
    pairs = _pair_factors(projectors, steps)
    kept = [projectors, pairs]
    factors = _by_step(steps, pairs, projectors)
    x = start
    rows, columns = start.shape[2:]
    for step, factor in zip(steps.sequence, factors, strict=True):
        kept.append(x)
        products = _multiply(factor, x, step, steps.left)
        both = torch.cat((x.view(groups, step.positions, -1), *products), 1)
        x = torch.bmm(step.mix, both).view(groups, -1, rows, columns)
    return x, kept


def _pair_factors(projectors: Tensor, steps: Steps) -> Tensor:
    """``S`` and ``Π`` of every pair."""
    c, n, groups = projectors.shape[-1], steps.pairs, steps.groups
    if n == 0:
        return projectors[:0]
    result = projectors.new_empty((n, groups, 2, c, c) if steps.left else (n, 2, groups, c, c))
    total, product = result.unbind(2 if steps.left else 1)
    first, second = projectors[: 2 * n * groups].view(n, 2, groups, c, c).unbind(1)
    torch.add(first, second, out=total)
    if groups == 1:
        torch.bmm(second[:, 0], first[:, 0], out=product[:, 0])
    else:
        torch.matmul(second, first, out=product)
    return result


def _by_step(steps: Steps, pairs: Tensor, projectors: Tensor) -> list[Tensor]:
    """The factors of each step, in the order in which steps are applied."""
    c, groups = projectors.shape[-1], steps.groups
    doubles = iter(pairs.unbind(0))
    if steps.pairs == len(steps.sequence):
        return list(doubles)
    single = (-1, groups, 1, c, c) if steps.left else (-1, 1, groups, c, c)
    singles = iter(projectors[2 * steps.pairs * groups :].view(single).unbind(0))
    return [next(doubles if step.count == 2 else singles) for step in steps.sequence]


def _stacked(factors: Tensor, positions: int) -> Tensor:
    """Factors from the left, one below the other, for each position: ``(groups · positions, count · c, c)``."""
    groups, count, c, _ = factors.shape
    if positions == 1:
        return factors.view(groups, count * c, c)
    return factors.view(groups, 1, count * c, c).expand(-1, positions, -1, -1).reshape(groups * positions, count * c, c)


def _multiply(factors: Tensor, x: Tensor, step: Step, left: bool) -> list[Tensor]:
    """The products, ``(groups, positions, rows · columns)`` each; from the left in one, with those of a position next
    to each other."""
    groups, positions, rows, columns = x.shape
    if left:
        products = torch.bmm(_stacked(factors, positions), x.view(groups * positions, rows, columns))
        return [products.view(groups, positions * step.count, rows * columns)]
    tall = x.view(groups, positions * rows, columns)
    return [torch.bmm(tall, factor.mT).view(groups, positions, rows * columns) for factor in factors.unbind(0)]


def compose_backward(
    grad: Tensor, frames: Tensor, steps: Steps, projectors: Tensor, pairs: Tensor, kernels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``start`` and ``frames``, given that of the kernel that :func:`compose` returned, of its shape."""
    grad_x, grad_factors = grad, []
    factors = _by_step(steps, pairs, projectors)
    for step, x, factor in zip(reversed(steps.sequence), reversed(kernels), reversed(factors), strict=True):
        both = torch.bmm(step.unmix, grad_x.flatten(2))
        grad_x, grad_factor = _multiply_backward(both, factor, x, step, steps.left)
        grad_factors.append(grad_factor)
    change = _projector_gradients(grad_factors[::-1], projectors, steps)
    return grad_x, torch.bmm(frames, change + change.mT)


def _multiply_backward(both: Tensor, factors: Tensor, x: Tensor, step: Step, left: bool) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the factors, ``(count, groups, c, c)``, given that of ``X`` and its products."""
    groups, positions, rows, columns = x.shape
    if left:
        own, later = both.split((positions, positions * step.count), 1)
        flat = later.reshape(groups * positions, -1, columns)
        own = own.reshape(groups * positions, rows, columns)
        found = torch.baddbmm(own, _stacked(factors, positions).mT, flat).view(x.shape)
        grad = torch.bmm(flat, x.view(groups * positions, rows, columns).mT)
        grad = grad.view(groups, positions, step.count, rows, rows)
        return found, (grad[:, 0] if positions == 1 else grad.sum(1)).transpose(0, 1)
    found, *parts = (part.reshape(groups, positions * rows, columns) for part in both.split(positions, 1))
    tall = x.view(groups, positions * rows, columns)
    for part, factor in zip(parts, factors.unbind(0), strict=True):
        found = torch.baddbmm(found, part, factor)
    return found.view(x.shape), torch.stack([torch.bmm(part.mT, tall) for part in parts])


def _projector_gradients(grads: Sequence[Tensor], projectors: Tensor, steps: Steps) -> Tensor:
    """In the order of the projectors. Those are symmetric."""
    n, groups, c = steps.pairs, steps.groups, projectors.shape[-1]
    result = torch.empty_like(projectors)
    if n:
        doubles = torch.stack([g for g, step in zip(grads, steps.sequence, strict=True) if step.count == 2], 1)
        grad_total, grad_product = doubles.view(2, n * groups, c, c).unbind(0)
        first, second = projectors[: 2 * n * groups].view(n, 2, groups, c, c).unbind(1)
        to_first, to_second = result[: 2 * n * groups].view(n, 2, groups, c, c).unbind(1)
        if groups == 1:
            first, second, to_first, to_second = first[:, 0], second[:, 0], to_first[:, 0], to_second[:, 0]
            torch.baddbmm(grad_total, second, grad_product, out=to_first)
            torch.baddbmm(grad_total, grad_product, first, out=to_second)
        else:
            shape = (n, groups, c, c)
            torch.add(grad_total.view(shape), torch.matmul(second, grad_product.view(shape)), out=to_first)
            torch.add(grad_total.view(shape), torch.matmul(grad_product.view(shape), first), out=to_second)
    singles = [g[0] for g, step in zip(grads, steps.sequence, strict=True) if step.count == 1]
    if singles:
        torch.cat(singles, out=result[2 * n * groups :])
    return result
