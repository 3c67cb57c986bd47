"""Two-tap kernels ``[P, I − P]`` applied two at a time: few large products in place of many small ones.

Two of them along one axis, ``P₁`` first, have the three taps ``Π``, ``S − 2 Π`` and ``I − S + Π`` with ``Π = P₂ P₁``
and ``S = P₁ + P₂``. So ``S X`` and ``Π X`` are all that has to be multiplied, for all positions of a kernel ``X`` at
once, and a matrix of small integers takes ``X`` and its products to the positions of the longer kernel.

A kernel is ``(groups, positions, rows, columns)`` here. Projectors multiply its rows from the *left*, or its columns
from the right; the factors of a step are ``(groups, count, c, c)``.
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

# Kernels of fewer channels are composed in `_tap_products`: fewer calls, and half as much arithmetic again.
_FEW_CHANNELS = 64


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
        by_taps: whether `_tap_products` composes them: no axis has two steps, the kernel begins with one position, and
            the channels are so few that calls count for more than arithmetic.
        pair_taps, single_taps: ``(·, 3, 2)`` and ``(·, 2, 1)``, by group: from ``S, Π`` and from ``P`` to the taps
            of a step, but for the identity in the last one.
        pair_untaps: the transpose of the first.
    """

    sequence: tuple[Step, ...]
    order: Tensor | None
    groups: int
    left: bool
    by_taps: bool
    pair_taps: Tensor
    single_taps: Tensor
    pair_untaps: Tensor

    @cached_property
    def pairs(self) -> int:
        return sum(step.count == 2 for step in self.sequence)

    @cached_property
    def inverse_order(self) -> Tensor | None:
        return None if self.order is None else torch.argsort(self.order)


def plan_steps(
    axes: tuple[int, ...],
    sides: tuple[int, ...],
    groups: int,
    channels: int,
    left: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Steps:
    """The steps of the taps along ``axes``, sorted, on ``channels`` and a kernel that begins with ``sides``."""
    # modes that replace tensors must not leave theirs in the cache
    make: Any = _plan_steps if torch._C._len_torch_dispatch_stack() == 0 else _plan_steps.__wrapped__
    steps: Steps = make(axes, sides, groups, channels < _FEW_CHANNELS, left, dtype, device)
    return steps


@lru_cache(maxsize=256)
def _plan_steps(
    axes: tuple[int, ...],
    sides: tuple[int, ...],
    groups: int,
    few: bool,
    left: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Steps:
    found: list[Step] = []
    pairs: list[int] = []
    singles: list[int] = []
    done = 0
    by_taps = few and prod(sides) == 1
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
            by_taps = by_taps and axis not in axes[done:]
        order = None if not pairs or not singles else torch.tensor(pairs + singles, device=device)
        double, single = (torch.tensor(rows, dtype=dtype, device=device)[:, 1:] for rows in (_PAIR, _SINGLE))
        of_pairs, of_singles = len(pairs) // 2 * groups, len(singles) * groups
        return Steps(
            tuple(found),
            order,
            groups,
            left,
            by_taps,
            double.expand(of_pairs, -1, -1),
            single.expand(of_singles, -1, -1),
            double.mT.contiguous().expand(of_pairs, -1, -1),
        )


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


def compose(start: Tensor, projectors: Tensor, steps: Steps) -> tuple[Tensor, list[Tensor]]:
    """A kernel after all steps.

    Args:
        start: ``(groups, positions, rows, columns)``.
        projectors: ``(taps · groups, c, c)``, ``P`` of each tap, in the order of ``steps``.
        steps: at least one.

    Returns:
        ``(groups, positions, rows · columns)``, and what :func:`compose_backward` needs: factors of pairs, and
        the kernel before each step.
    """
    groups, c = steps.groups, projectors.shape[-1]
    pairs = pair_factors(projectors, steps).view(-1, groups, 2, c, c) if steps.pairs else projectors[:0]
    kept = [pairs]
    factors = _by_step(steps, pairs, projectors)
    x = start
    rows, columns = start.shape[2:]
    for step, factor in zip(steps.sequence, factors, strict=True):
        kept.append(x)
        products = _multiply(factor, x, step, steps.left)
        both = torch.cat((x.view(groups, step.positions, -1), *products), 1)
        x = torch.bmm(step.mix, both).view(groups, -1, rows, columns)
    return x, kept


def pair_factors(projectors: Tensor, steps: Steps) -> Tensor:
    """``S`` and ``Π`` of every pair, ``(pairs · groups, 2, c, c)``; at least one."""
    first, second = _of_pairs(projectors, steps)
    return torch.stack((first + second, torch.bmm(second, first)), 1)


def _of_pairs(projectors: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """First and second projectors of every pair, ``(pairs · groups, c, c)`` each."""
    n, groups = steps.pairs, steps.groups
    if groups == 1:
        return projectors[: 2 * n : 2], projectors[1 : 2 * n : 2]
    first, second = projectors[: 2 * n * groups].view(n, 2, groups, *projectors.shape[1:]).unbind(1)
    return first.flatten(0, 1), second.flatten(0, 1)


def _by_step(steps: Steps, pairs: Tensor, projectors: Tensor) -> list[Tensor]:
    """The factors of each step, in the order in which steps are applied."""
    c, groups = projectors.shape[-1], steps.groups
    doubles = iter(pairs.unbind(0))
    if steps.pairs == len(steps.sequence):
        return list(doubles)
    singles = iter(projectors[2 * steps.pairs * groups :].view(-1, groups, 1, c, c).unbind(0))
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
    return [torch.bmm(tall, factor.mT).view(groups, positions, rows * columns) for factor in factors.unbind(1)]


def compose_backward(grad: Tensor, projectors: Tensor, steps: Steps, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of ``start`` and ``projectors``, given that of the kernel that :func:`compose` returned, of its shape.

    Of the second only the symmetric part has a meaning, since projectors are symmetric.
    """
    pairs, *kernels = kept
    grad_x, grad_factors = grad, []
    factors = _by_step(steps, pairs, projectors)
    for step, x, factor in zip(reversed(steps.sequence), reversed(kernels), reversed(factors), strict=True):
        both = torch.bmm(step.unmix, grad_x.flatten(2))
        grad_x, grad_factor = _multiply_backward(both, factor, x, step, steps.left)
        grad_factors.append(grad_factor)
    in_order = list(zip(reversed(grad_factors), steps.sequence, strict=True))
    doubles = [grad for grad, step in in_order if step.count == 2]
    singles = [grad[:, 0] for grad, step in in_order if step.count == 1]
    of_pairs = torch.cat(doubles) if doubles else None
    return grad_x, projector_gradients(of_pairs, torch.cat(singles) if singles else None, projectors, steps)


def _multiply_backward(both: Tensor, factors: Tensor, x: Tensor, step: Step, left: bool) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the factors, ``(groups, count, c, c)``, given that of ``X`` and its products."""
    groups, positions, rows, columns = x.shape
    if left:
        own, later = both.narrow(1, 0, positions), both.narrow(1, positions, positions * step.count)
        flat = later.reshape(groups * positions, -1, columns)
        own = own.reshape(groups * positions, rows, columns)
        found = torch.baddbmm(own, _stacked(factors, positions).mT, flat).view(x.shape)
        grad = torch.bmm(flat, x.view(groups * positions, rows, columns).mT)
        grad = grad.view(groups, positions, step.count, rows, rows)
        return found, grad[:, 0] if positions == 1 else grad.sum(1)
    found, *parts = (part.reshape(groups, positions * rows, columns) for part in both.chunk(1 + step.count, 1))
    tall = x.view(groups, positions * rows, columns)
    for part, factor in zip(parts, factors.unbind(1), strict=True):
        found = torch.baddbmm(found, part, factor)
    return found.view(x.shape), torch.stack([torch.bmm(part.mT, tall) for part in parts], 1)


def projector_gradients(of_pairs: Tensor | None, of_singles: Tensor | None, projectors: Tensor, steps: Steps) -> Tensor:
    """Those of the projectors, which are symmetric, in their order; at least one argument is given.

    Args:
        of_pairs: the gradients of ``S`` and ``Π``, ``(pairs · groups, 2, c, c)``.
        of_singles: of the projectors of single taps, ``(taps · groups, c, c)``.
    """
    if of_pairs is None:
        assert of_singles is not None
        return of_singles
    first, second = _of_pairs(projectors, steps)
    grad_total, grad_product = of_pairs.unbind(1)
    to_first = torch.baddbmm(grad_total, second, grad_product)
    to_second = torch.baddbmm(grad_total, grad_product, first)
    both = torch.stack((to_first, to_second), 1)
    if steps.groups > 1:
        both = both.view(steps.pairs, steps.groups, 2, *first.shape[1:]).transpose(1, 2).contiguous()
    found = both.view(-1, *first.shape[1:])
    return found if of_singles is None else torch.cat((found, of_singles))
