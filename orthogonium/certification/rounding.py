"""Arithmetic that errs on the safe side: sums and products rounded up, and what a floating-point sum may be off by."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orthogonium.linalg._rounding import gamma


def times_up(a: float, b: float) -> float:
    """Never below ``a · b`` of numbers that are not negative; exact where one of them is one or zero."""
    if a == 0 or b == 0:
        return 0.0
    if a == 1 or b == 1:
        return max(a, b) if a == b == 1 else a * b
    return math.nextafter(a * b, math.inf)


def sum_up(values: Iterable[float]) -> float:
    """Never below the sum of numbers that are not negative."""
    total = 0.0
    for value in values:
        total = value if total == 0 else total if value == 0 else math.nextafter(total + value, math.inf)
    return total


def hypot_up(values: Iterable[float]) -> float:
    """Never below the root of the sum of squares."""
    entries = [abs(value) for value in values]
    largest = max(entries, default=0.0)
    if largest == 0 or math.isinf(largest) or sum(entry > 0 for entry in entries) == 1:
        return largest
    return largest * math.sqrt(sum((entry / largest) ** 2 for entry in entries)) * (1 + 2.0**-48)


def sqrt_up(value: float) -> float:
    """Never below the root; exact for squares of small integers."""
    root = math.sqrt(value)
    return root if root.is_integer() and root * root == value else math.nextafter(root, math.inf)


def norms_up(batch: Tensor) -> Tensor:
    """Never below the ℓ2 norm of each sample of a float64 ``(N, ...)``: ``(N,)``."""
    rows = batch.flatten(1)
    # squares below 2⁻¹⁰²² may be lost: at most that much under the root for each entry
    return torch.linalg.vector_norm(rows, dim=1) * (1 + 2 * gamma(rows.shape[1] + 4)) + rows.shape[1] ** 0.5 * 2.0**-510


@dataclass(frozen=True)
class Arithmetic:
    """A floating-point format that rounds to nearest: half a unit in the last place, and the smallest normal number."""

    dtype: torch.dtype
    roundoff: float
    smallest: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Arithmetic":
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"precision must be torch.float64 or torch.float32, got {dtype}")
        info = torch.finfo(dtype)
        return cls(dtype, info.eps / 2, info.smallest_normal)


BINARY64 = Arithmetic.of(torch.float64)
