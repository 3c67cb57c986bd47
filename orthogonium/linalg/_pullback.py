"""A value and its pullback, the map from its gradient to that of the matrix: an autograd node without autograd.

Whoever keeps a weight for several readers builds a node of its own around it; a second graph inside, run by a second
engine, would cost as much time as a 64 × 64 matrix takes to orthogonalise.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._precision import without_autocast

Pullback = Callable[[Tensor], Tensor]
WithPullback = Callable[..., tuple[Tensor, Pullback]]


def with_pullback_in_working_precision(function: WithPullback) -> WithPullback:
    """:func:`in_working_precision` for a function that returns a value and its pullback."""

    @wraps(function)
    def call(matrix: Tensor, *args: object) -> tuple[Tensor, Pullback]:
        check_matrix("matrix", matrix)
        check_floating("matrix", matrix)
        if matrix.numel() == 0:
            return matrix.clone(), torch.zeros_like
        dtype = matrix.dtype
        with without_autocast(matrix):
            if dtype in (torch.float32, torch.float64):
                return function(matrix, *args)
            value, pullback = function(matrix.float(), *args)
        return value.to(dtype), lambda grad: pullback(grad.float()).to(dtype)

    return call


def transposed(value: Tensor, pullback: Pullback) -> tuple[Tensor, Pullback]:
    """``f(Wᵀ)ᵀ`` from what ``f`` gave for ``Wᵀ``."""
    return value.mT, lambda grad: pullback(grad.mT).mT
