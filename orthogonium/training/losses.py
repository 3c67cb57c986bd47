"""Losses that ask a network of bounded slope for large margins."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MarginCrossEntropy(nn.Module):
    """Cross-entropy of ``temperature · (logits − offset · onehot(label))``.

    The logits of a 1-Lipschitz network cannot grow, so plain cross-entropy keeps pushing on points that
    are long safe, and underfits. The offset asks the right logit to win by that much, the temperature says
    how sharply the loss forgets points that do. With orthonormal rows in the last layer a margin of
    ``√2 r`` certifies the ℓ2 radius r, so an offset of ``√2 r`` aims at that radius.

    Args:
        temperature: above zero; larger values look at the hardest points.
        offset: at least zero, in units of logits.

    Shape:
        logits ``(N, classes)`` and labels ``(N,)`` to a scalar.

    Source:
        Prach and Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks",
        ECCV 2022, section 5, which writes the same with the temperature as a divisor.
    """

    def __init__(self, temperature: float = 10.0, offset: float = 1.0) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
        if not (offset >= 0 and math.isfinite(offset)):
            raise ValueError(f"offset must be a finite number of at least 0, got {offset}")
        self.temperature = temperature
        self.offset = offset

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        right = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        return F.cross_entropy(self.temperature * (logits - self.offset * right), labels)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, offset={self.offset}"


class MulticlassHinge(nn.Module):
    """``max(0, margin − (right logit − largest wrong logit))``, averaged.

    Zero as soon as every point is certified at ``margin / √2`` under orthonormal last rows: it spends
    nothing on points that are safe, and at each point moves two logits only.

    Args:
        margin: above zero, in units of logits.

    Shape:
        logits ``(N, classes)`` and labels ``(N,)`` to a scalar.

    Source:
        Crammer and Singer, "On the algorithmic implementation of multiclass kernel-based vector machines",
        JMLR 2, 2001.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        if not (margin > 0 and math.isfinite(margin)):
            raise ValueError(f"margin must be a finite number above 0, got {margin}")
        self.margin = margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        right = logits.gather(1, labels[:, None])[:, 0]
        is_right = F.one_hot(labels, logits.shape[1]).bool()
        wrong = logits.masked_fill(is_right, -math.inf).amax(1)
        return torch.relu(self.margin - (right - wrong)).mean()

    def extra_repr(self) -> str:
        return f"margin={self.margin}"
