"""Kernels of one step along each axis, such as 3×3 at stride one: taps as matrices, and one product an axis.

One or two taps that follow each other along an axis make two or three matrices: ``P, I − P``, or, of ``S = P₁ + P₂``
and ``Π = P₂ P₁``, the matrices ``Π, S − 2 Π, I − S + Π``. Where no axis has a second step and the core is a single
position, the kernel is their product over the axes: every position has one product of its own, and nothing is mixed.

The rows that are multiplied, ``(groups, rows · positions, c)``, are those of the transposed start if projectors act
from the left. With each axis they become as many times more as it has positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthogonium.linalg._constants import last_identity
from orthogonium.linalg._projector_pairs import Steps, pair_factors, projector_gradients


def compose_taps(start: Tensor, projectors: Tensor, steps: Steps) -> tuple[Tensor, list[Tensor]]:
    """As :func:`orthogonium.linalg._projector_pairs.compose`, for steps that are to be composed by taps."""
    groups, c = steps.groups, projectors.shape[-1]
    taps = _tap_matrices(projectors, steps)
    x = start[:, 0].mT if steps.left else start[:, 0]
    rows = x.shape[1]
    kept = [*taps]
    for tap in taps:
        kept.append(x)
        x = torch.bmm(x, tap.mT).view(groups, -1, c)
    kernel = x.view(groups, rows, -1, c)
    return kernel.permute(0, 2, 3, 1) if steps.left else kernel.transpose(1, 2), kept


def compose_taps_backward(
    grad: Tensor, projectors: Tensor, steps: Steps, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As :func:`orthogonium.linalg._projector_pairs.compose_backward`."""
    groups, c, count = steps.groups, projectors.shape[-1], len(steps.sequence)
    taps, kernels = kept[:count], kept[count:]
    of_pairs = grad.new_empty((steps.pairs, groups, 3 * c, c)) if steps.pairs else None
    of_singles = grad.new_empty((count - steps.pairs, groups, 2 * c, c)) if steps.pairs < count else None
    places = _by_step(steps, of_pairs, of_singles)
    rows = (grad.permute(0, 3, 1, 2) if steps.left else grad.transpose(1, 2)).contiguous()
    for tap, x, place in zip(reversed(taps), reversed(kernels), reversed(places), strict=True):
        wide = rows.view(groups, x.shape[1], -1)
        torch.bmm(wide.mT, x, out=place)
        rows = torch.bmm(wide, tap)
    found = _projector_gradients(of_pairs, of_singles, projectors, steps)
    return (rows.mT if steps.left else rows).unsqueeze(1), found


def _tap_matrices(projectors: Tensor, steps: Steps) -> list[Tensor]:
    """Of each step, in the order in which steps are applied, its taps one below the other: ``(groups, k · c, c)``."""
    c, groups, pairs = projectors.shape[-1], steps.groups, steps.pairs
    of_pairs = of_singles = None
    if pairs:
        factors = pair_factors(projectors, steps).view(-1, 2, c * c)
        taps = torch.baddbmm(last_identity(3, c, factors), steps.pair_taps, factors)
        of_pairs = taps.view(pairs, groups, 3 * c, c)
    if pairs < len(steps.sequence):
        singles = projectors[2 * pairs * groups :].view(-1, 1, c * c)
        taps = torch.baddbmm(last_identity(2, c, singles), steps.single_taps, singles)
        of_singles = taps.view(-1, groups, 2 * c, c)
    return _by_step(steps, of_pairs, of_singles)


def _by_step(steps: Steps, of_pairs: Tensor | None, of_singles: Tensor | None) -> list[Tensor]:
    if of_pairs is None or of_singles is None:
        one_kind = of_singles if of_pairs is None else of_pairs
        return [] if one_kind is None else list(one_kind.unbind(0))
    doubles, singles = iter(of_pairs.unbind(0)), iter(of_singles.unbind(0))
    return [next(doubles if step.count == 2 else singles) for step in steps.sequence]


def _projector_gradients(
    of_pairs: Tensor | None, of_singles: Tensor | None, projectors: Tensor, steps: Steps
) -> Tensor:
    c = projectors.shape[-1]
    of_factors = of_projectors = None
    if of_pairs is not None:
        of_factors = torch.bmm(steps.pair_untaps, of_pairs.view(-1, 3, c * c)).view(-1, 2, c, c)
    if of_singles is not None:
        first, last = of_singles.view(-1, 2, c, c).unbind(1)
        of_projectors = first - last
    return projector_gradients(of_factors, of_projectors, projectors, steps)
