"""Two-tap kernels ``[P, I − P]`` applied two at a time: few large products in place of many small ones.

Two of them along one axis, ``P₁`` first, have the three taps ``Π``, ``S − 2 Π`` and ``I − S + Π`` with ``Π = P₂ P₁`` and
``S = P₁ + P₂``. So ``S X`` and ``Π X`` are all that has to be multiplied, for all positions of a kernel ``X`` at once; a
matrix of small integers then mixes positions, and in the last step lays the kernel out as convolutions read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Tap by tap (rows), what X and its products, S X and Π X or P X alone, contribute.
_PAIR = ((0.0, 0.0, 1.0), (0.0, 1.0, -2.0), (1.0, -1.0, 1.0))
_SINGLE = ((0.0, 1.0), (1.0, -1.0))


@dataclass(frozen=True)
class Step:
    """One or two taps along an axis.

    Attributes:
        first, count: which taps.
        keep: ``(1, new, old)`` positions: what ``X`` contributes.
        add: ``(1, new, old · count)``: what its products do.
    """

    first: int
    count: int
    keep: Tensor
    add: Tensor


@lru_cache(maxsize=256)
def plan_steps(
    axes: tuple[int, ...], sides: tuple[int, ...], left: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Step, ...]:
    """The steps of the taps along ``axes``, on a kernel that begins with ``sides``."""
    steps, done = [], 0
    with torch.inference_mode(False):
        while done < len(axes):
            axis = axes[done]
            count = 2 if axes[done : done + 2] == (axis, axis) else 1
            mixing = [part.to(dtype=dtype, device=device) for part in _mixing(sides, axis, count)]
            # products lie next to each other per position where they were multiplied from the left
            add = torch.stack(mixing[1:], -1).flatten(1) if left else torch.cat(mixing[1:], 1)
            steps.append(Step(done, count, mixing[0].unsqueeze(0), add.unsqueeze(0)))
            sides = (*sides[:axis], sides[axis] + count, *sides[axis + 1 :])
            done += count
    return tuple(steps)


def _mixing(sides: tuple[int, ...], axis: int, count: int) -> list[Tensor]:
    """For ``X`` and each of its products, the matrix from old to new positions."""
    old = torch.arange(sides[axis])
    result = []
    for contributions in zip(*(_PAIR if count == 2 else _SINGLE), strict=True):
        along = torch.zeros(sides[axis] + count, sides[axis])
        for tap, weight in enumerate(contributions):
            along[old + tap, old] = weight
        before, after = torch.Size(sides[:axis]).numel(), torch.Size(sides[axis + 1 :]).numel()
        result.append(torch.kron(torch.kron(torch.eye(before), along), torch.eye(after)))
    return result


def compose(
    start: Tensor, frames: Tensor, steps: Sequence[Step], left: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A kernel after all steps.

    Args:
        start: ``(groups, positions, c, n)``, or ``(groups, positions, n, c)`` where projectors act from the right.
        frames: ``(taps, groups, c, r)``, orthonormal columns.
        steps: at least one.
        left: the side on which projectors act.

    Returns:
        The kernel, ``(groups, c, n, positions)`` or ``(groups, n, c, positions)``; the projectors; the kernel before
        each step and the factors of each step, for :func:`compose_backward`.
    """
    taps, groups, c, _ = frames.shape
    flat = frames.flatten(0, 1)
    projectors = torch.bmm(flat, flat.mT).view(taps, groups, c, c)
    kernels, factors = [], []
    x = start
    for step in steps:
        factor = _factors(projectors[step.first : step.first + step.count], left)
        kernels.append(x)
        factors.append(factor)
        products = _multiply(factor, x, left)
        if step is steps[-1]:
            flat_x, flat_products = x.flatten(2).mT, products.mT
            keep, add = step.keep.mT.expand(groups, -1, -1), step.add.mT.expand(groups, -1, -1)
            mixed = torch.baddbmm(torch.bmm(flat_x, keep), flat_products, add)
            return mixed.view(groups, *x.shape[2:], -1), projectors, kernels, factors
        keep, add = step.keep.expand(groups, -1, -1), step.add.expand(groups, -1, -1)
        mixed = torch.baddbmm(torch.bmm(keep, x.flatten(2)), add, products)
        x = mixed.view(groups, -1, *x.shape[2:])
    raise AssertionError("no steps")


def _factors(projectors: Tensor, left: bool) -> Tensor:
    """What ``X`` is multiplied by: ``S`` and ``Π``, or ``P``; ``(groups, count, c, c)``, or from the right ``(count, …``."""
    if len(projectors) == 1:
        return projectors.transpose(0, 1) if left else projectors
    first, second = projectors.unbind(0)
    groups, c = first.shape[:2]
    result = first.new_empty((groups, 2, c, c) if left else (2, groups, c, c))
    total, product = result.unbind(1 if left else 0)
    torch.add(first, second, out=total)
    torch.bmm(second, first, out=product)
    return result


def _multiply(factors: Tensor, x: Tensor, left: bool) -> Tensor:
    """All products, ``(groups, positions · count, c · n)`` from the left, else ``(groups, count · positions, n · c)``."""
    groups, positions = x.shape[:2]
    if left:
        stacked = factors.flatten(1, 2).unsqueeze(1).expand(-1, positions, -1, -1).flatten(0, 1)
        return torch.bmm(stacked, x.flatten(0, 1)).view(groups, positions * factors.shape[1], -1)
    count = len(factors)
    rows = x.flatten(1, 2).expand(count, -1, -1, -1).flatten(0, 1)
    products = torch.bmm(rows, factors.flatten(0, 1).mT).view(count, groups, positions, -1)
    return products.transpose(0, 1).reshape(groups, count * positions, -1)


def compose_backward(
    grad: Tensor,
    frames: Tensor,
    projectors: Tensor,
    kernels: Sequence[Tensor],
    factors: Sequence[Tensor],
    steps: Sequence[Step],
    left: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``start`` and ``frames``, given that of the kernel that :func:`compose` returned."""
    groups = grad.shape[0]
    change = torch.empty_like(projectors)
    flat = grad.flatten(1, 2).mT
    for step, x, factor in zip(reversed(steps), reversed(kernels), reversed(factors), strict=True):
        grad_products = torch.bmm(step.add.mT.expand(groups, -1, -1), flat)
        grad_x = torch.bmm(step.keep.mT.expand(groups, -1, -1), flat).view(x.shape)
        grad_factor, grad_x = _multiply_backward(grad_products, grad_x, factor, x, left)
        taps = slice(step.first, step.first + step.count)
        _factors_backward(grad_factor, projectors[taps], change[taps])
        flat = grad_x.flatten(2)
    flat_change, flat_frames = change.flatten(0, 1), frames.flatten(0, 1)
    grad_frames = torch.baddbmm(torch.bmm(flat_change, flat_frames), flat_change.mT, flat_frames)
    return grad_x, grad_frames.view(frames.shape)


def _multiply_backward(
    grad_products: Tensor, grad_x: Tensor, factors: Tensor, x: Tensor, left: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the factors, ``(count, groups, c, c)``, and what they add to that of ``x``."""
    groups, positions = x.shape[:2]
    if left:
        count, c = factors.shape[1:3]
        stacked = factors.flatten(1, 2).unsqueeze(1).expand(-1, positions, -1, -1).flatten(0, 1)
        flat = grad_products.view(groups * positions, count * c, -1)
        found = torch.baddbmm(grad_x.flatten(0, 1), stacked.mT, flat).view(x.shape)
        grad_factors = torch.bmm(flat, x.flatten(0, 1).mT).view(groups, positions, count, c, c)
        return (grad_factors[:, 0] if positions == 1 else grad_factors.sum(1)).transpose(0, 1), found
    count, _, c, _ = factors.shape
    parts = grad_products.view(groups, count, -1, c).transpose(0, 1).reshape(count * groups, -1, c)
    rows = x.flatten(1, 2)
    grad_factors = torch.bmm(parts.mT, rows.expand(count, -1, -1, -1).flatten(0, 1)).view(factors.shape)
    found = grad_x.flatten(1, 2)
    for part, factor in zip(parts.view(count, groups, -1, c), factors, strict=True):
        found = torch.baddbmm(found, part, factor)
    return grad_factors, found.view(x.shape)


def _factors_backward(grad: Tensor, projectors: Tensor, change: Tensor) -> None:
    """Write the gradient of the projectors into ``change``; projectors are symmetric."""
    if len(projectors) == 1:
        change.copy_(grad)
        return
    (first, second), (grad_total, grad_product) = projectors.unbind(0), grad.unbind(0)
    torch.baddbmm(grad_total, second, grad_product, out=change[0])
    torch.baddbmm(grad_total, grad_product, first, out=change[1])
