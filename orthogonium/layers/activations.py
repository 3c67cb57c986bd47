"""Activations that never grow a distance and never shrink a gradient: they only reorder."""

import torch
from torch import Tensor, nn


class GroupSort(nn.Module):
    """Sort the entries of every group of ``group_size`` neighbours, largest first.

    Wherever the order is strict the Jacobian is a permutation, so the gradient keeps its norm, and the
    map is 1-Lipschitz in every ℓp norm everywhere. Comparing and moving numbers rounds nothing. A group
    as long as the whole axis sorts it fully; a group of two is :class:`MaxMin`.

    Args:
        group_size: entries per group, at least 2; it must divide the length of ``dim``.
        dim: the axis of features, by default axis 1: channels of an image, features of a ``(batch,
            features)`` matrix. Use -1 for features on the last of several axes.

    Shape:
        any, and the same after.

    Raises:
        ValueError: ``group_size`` is below 2; or, in the call, it does not divide the axis.

    Source:
        Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """

    def __init__(self, group_size: int, dim: int = 1) -> None:
        super().__init__()
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size must be an int, got {group_size!r}")
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}: smaller groups change nothing")
        self.group_size = group_size
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        dim = self._axis(features)
        groups = features.unflatten(dim, (-1, self.group_size))
        if self.group_size == 2:  # two comparisons, where a sort would allocate indices and gather
            first, second = groups.unbind(dim + 1)
            ordered = torch.stack((torch.maximum(first, second), torch.minimum(first, second)), dim + 1)
        else:
            ordered = groups.sort(dim=dim + 1, descending=True).values
        return ordered.flatten(dim, dim + 1)

    def _axis(self, features: Tensor) -> int:
        """``dim`` counted from the front, or an error that says what would fit."""
        if not -features.ndim <= self.dim < features.ndim:
            raise ValueError(
                f"dim={self.dim} is not an axis of an input of shape {tuple(features.shape)}. "
                f"Use dim=-1 for features on the last axis."
            )
        dim = self.dim % features.ndim
        if features.shape[dim] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the {features.shape[dim]} features on axis "
                f"{self.dim} of an input of shape {tuple(features.shape)}. "
                f"Use a multiple of {self.group_size} features."
            )
        return dim

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, dim={self.dim}"


class MaxMin(GroupSort):
    """Replace every pair of neighbours by its larger and its smaller entry: ``(a, b) → (max, min)``.

    The cheapest :class:`GroupSort`, and enough to approximate every 1-Lipschitz function when the
    matrices around it are orthogonal or of unit norm.

    Args:
        dim: the axis of features, of even length, as in :class:`GroupSort`.

    Source:
        Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019; the same pairs
        appear as OPLU in Chernodub and Nowicki, "Norm-preserving orthogonal permutation linear unit
        activation functions", arXiv:1604.02313, 2016.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__(group_size=2, dim=dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
