"""How far float64 arithmetic can be off, and norms rounded upwards.

Trusted are the basic operations of IEEE-754 binary64 and conventional sums of products, in any order of summation and
with or without fused operations. Nothing else is.
"""

import math

import torch
from torch import Tensor

ROUNDOFF = 2.0**-53  # of float64, to nearest
UP = 1 + 2.0**-50  # covers a handful of float64 roundings
TINY = 2.0**-1022  # the smallest normal float64: what an operation that underflows can lose


def gamma(terms: int, roundoff: float = ROUNDOFF) -> float:
    """``k·u / (1 − k·u)``: relative to ``|A||B|``, the most that a sum of ``terms`` products can be off.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM 2002, section 3.1.
    """
    if terms * roundoff >= 1:
        return math.inf
    return terms * roundoff / (1 - terms * roundoff) * UP


def frobenius_bound(*parts: Tensor) -> Tensor:
    """Never below the Frobenius norm of each matrix of a batch, given as one real array or as several parts.

    Args:
        parts: ``(..., m, n)`` each, float64, with squares that do not overflow.

    Returns:
        ``(...)``.
    """
    terms = sum(part.shape[-2] * part.shape[-1] for part in parts)
    total = sum(part.square().sum((-2, -1)) for part in parts)
    return torch.sqrt(total * (1 + 2 * gamma(terms + 2)) + terms * TINY) * UP  # type: ignore[arg-type]


def in_float64(tensor: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU where the device has no float64."""
    tensor = tensor.detach()
    return tensor.to("cpu", torch.float64) if tensor.device.type == "mps" else tensor.to(torch.float64)


def keeps_subnormals(device: torch.device) -> bool:
    """Whether numbers below the normal range survive; ``torch.set_flush_denormal`` switches that off."""
    return bool(torch.full((), 2.0**-140, dtype=torch.float32, device=device).double() > 0)
