"""Roads to the polar factor by products alone: minimax steps on ``W`` itself.

Source: Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from orthogonium.linalg._figures import frobenius, largest
from orthogonium.linalg._polar_record import PRODUCTS, SHIFTED, Routed, as_stretch, keeps_rotated, nothing, route_of
from orthogonium.linalg._precision import scaled_to_one
from orthogonium.linalg._products import add_product, gram_error, newton_schulz, product, symmetric_product
from orthogonium.linalg.minimax import Quintic, polar_schedule

# Batches of matrices of these sides, and of this many entries of Gram matrices in all, take products alone: LAPACK's
# eigenvectors of one matrix after the other cost 30 to 50 pairs of products.
_SIDES, _ENTRIES = range(14, 49), 8 * 32**2
# Without a derivative, which would take several times the products of the factor itself, any matrix of these sides.
_SIDES_FORWARD = range(48, 257)

# Singular values in terms of the largest. The least that is expected: where their squares have a relative variance
# below the first figure.
_MODERATE_VARIANCE, _MODERATE = 0.8, 0.18


class Aim(NamedTuple):
    """How far a schedule reaches and how its end is judged."""

    lowest: float  # the least singular value that is expected elsewhere
    settled: float  # what schedules leave of |1 − σ|
    left: float  # what may be left of ‖Q Qᵀ − I‖_F, in units of √m eps
    again: bool  # whether a second round of that reach is worth it


# The derivative has to know where the singular values lie: nothing but rounding may be left, and what could hide in it
# is counted in. All matrices of a batch share its schedule, whose rounding errors grow with its reach: no second round.
# Without a derivative, what the last step corrects to rounding will do.
WITH_DERIVATIVE, FORWARD = Aim(0.045, 1e-6, 20, again=False), Aim(0.035, 1e-5, 500, again=True)
# Where ‖Q Qᵀ − I‖_F is below the first figure the singular values are above the second: two more steps will do.
_CLOSE, _CLOSE_VALUE = 0.51, 0.7

# The first attempt by a long schedule covers singular values down to this share of the Frobenius norm.
_LOWEST = 1e-3
_ATTEMPTS = 3


def worth_products(matrix: Tensor, derivative: bool) -> bool:
    """Whether :func:`by_few_products` is faster than what comes after it, should it succeed."""
    if matrix.dtype != torch.float32:
        return False
    if matrix.is_cuda:
        return True
    if not keeps_rotated(matrix):
        return False
    rows = matrix.shape[-2]
    many = rows in _SIDES and matrix.ndim > 2 and matrix.shape[:-1].numel() * rows >= _ENTRIES
    return many or (not derivative and rows in _SIDES_FORWARD)


def by_few_products(
    matrix: Tensor, gram: Tensor, variance: float, budget: int, aim: Aim = WITH_DERIVATIVE
) -> Routed | None:
    """Minimax steps on ``W`` itself for ``κ`` of some 50 at most, without a derivative of a few hundred; float32.

    Their number rests on a guess, and their end shows whether that was right: small singular values are not one by
    then. ``‖(W Wᵀ)²‖_F^¼``, to which ``W`` is scaled, exceeds ``‖W‖₂`` by a factor of ``m^⅛`` at most.
    """
    lowest = _MODERATE if variance < _MODERATE_VARIANCE else aim.lowest
    schedule = polar_schedule(lowest, aim.settled)
    if 3 * len(schedule) + 2 > 2 * budget:
        return None
    square = product(gram, gram)
    bound = frobenius(square)[..., None, None].sqrt()
    scale = bound.sqrt()
    q = matrix / scale
    a, b, c = schedule[0]
    factor = torch.addcmul(gram * (b / bound), square, c / (bound * bound))
    q = add_product(q, factor, q, scale=1.0, addend_scale=a)
    q, error = _steps_and_error(q, schedule[1:])
    limit = aim.left * matrix.shape[-2] ** 0.5 * torch.finfo(matrix.dtype).eps
    covered, left = least_source(schedule, 1 - limit), largest(frobenius(error))
    if not left <= limit:
        close = left <= _CLOSE
        if not (close or aim.again):
            return None
        covered = least_source(schedule, _CLOSE_VALUE)
        q, error = _steps_and_error(q, polar_schedule(_CLOSE_VALUE if close else aim.lowest, aim.settled))
        if not largest(frobenius(error)) <= limit:
            return None
    q = add_product(q, error, q, scale=-0.5)
    return q, nothing(matrix)[0], as_stretch(scale[..., 0, 0], matrix), route_of(PRODUCTS, covered)


@lru_cache
def least_source(schedule: tuple[Quintic, ...], value: float) -> float:
    """The least positive number that a schedule takes to ``value`` < 1, from below.

    Its polynomials grow up to where the interval begins that they are laid out for, and stay about one from there on.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        x = middle
        for a, b, c in schedule:
            x *= a + x * x * (b + c * x * x)
        low, high = (low, middle) if x >= value else (middle, high)
    return low


def _steps_and_error(matrix: Tensor, schedule: Sequence[Quintic]) -> tuple[Tensor, Tensor]:
    q = minimax_steps(matrix, schedule)
    return q, gram_error(q)


def by_minimax(matrix: Tensor) -> Routed | None:
    """A long schedule of minimax steps, for devices on which a factorisation is slow.

    The first attempt covers ``σ ≥ 1e-3 ‖W‖_F``. A longer schedule amplifies the rounding errors of large singular
    values (its first polynomials are steep there), so the next ones run in float64. None covers a singular matrix.
    """
    tolerance = 1e-2  # two Newton–Schulz steps take this to rounding
    for attempt in range(1, _ATTEMPTS + 1):
        work = matrix if attempt == 1 else matrix.double()
        lowest = _LOWEST**attempt
        scale = frobenius(work)
        schedule = polar_schedule(lowest, torch.finfo(work.dtype).eps)
        q = minimax_steps(work / scale[..., None, None], schedule)
        left = largest(frobenius(gram_error(q)))
        if left <= tolerance:
            q = newton_schulz(newton_schulz(q)).to(matrix.dtype)
            stretch = as_stretch(scale.to(matrix.dtype), matrix)
            return q, nothing(matrix)[0], stretch, route_of(PRODUCTS, _covered(lowest, left, matrix))
    return None


def by_fixed_schedule(matrix: Tensor) -> Routed:
    """A number of minimax steps that depends on the dtype alone; nothing is read back from the device.

    ``eps ‖W‖_F`` times the identity is added first: it is below rounding for a matrix of full rank, and completes a
    singular one. Computed in float64, see :func:`by_minimax`. NaN and Inf pass through.
    """
    eps = torch.finfo(matrix.dtype).eps
    scaled, _ = scaled_to_one(matrix.double())
    norm = torch.linalg.matrix_norm(scaled, keepdim=True)
    q = scaled / torch.where(norm > 0, norm, 1.0)
    q.diagonal(dim1=-2, dim2=-1).add_(eps)
    lowest = eps / 100
    q = minimax_steps(q, polar_schedule(lowest, torch.finfo(q.dtype).eps))
    return newton_schulz(q).to(matrix.dtype), *nothing(matrix), route_of(SHIFTED, lowest)


def minimax_steps(matrix: Tensor, schedule: Sequence[Quintic]) -> Tensor:
    """The odd quintics ``a x + b x³ + c x⁵`` of a schedule, one after the other, of the singular values."""
    for a, b, c in schedule:
        gram = symmetric_product(matrix, matrix.mT)
        factor = add_product(gram, gram, gram, scale=c, addend_scale=b)
        matrix = add_product(matrix, factor, matrix, scale=1.0, addend_scale=a)
    return matrix


def _covered(lowest: float, left: float, matrix: Tensor) -> float:
    """The least singular value that may have come along with those from ``lowest`` on.

    Where more than rounding is left at the end, it is of values a little below: the derivative has to cover them.
    """
    return lowest if left <= 4 * matrix.shape[-2] * torch.finfo(matrix.dtype).eps else lowest / 5
