"""What a road to the polar factor leaves for the derivative: see the table in `_polar_routes`."""

import torch
from torch import Tensor

NEAR, EIGENBASIS, PRODUCTS, SHIFTED = 0.0, 1.0, 2.0, 3.0
SVD_ONLY = -1  # as a budget

Routed = tuple[Tensor, Tensor, Tensor, Tensor]


def keeps_rotated(matrix: Tensor) -> bool:
    """Whether ``stretch`` has the shape of ``matrix`` and not of its singular values."""
    return matrix.shape[-1] < 2 * matrix.shape[-2]


def route_of(kind: float, parameter: float) -> Tensor:
    return torch.tensor((kind, parameter), dtype=torch.float64)


def as_stretch(scale: Tensor, matrix: Tensor) -> Tensor:
    """One figure per matrix, ``(...)``, in the shape of ``stretch``; takes no memory."""
    if keeps_rotated(matrix):
        return scale[..., None, None].expand(matrix.shape)
    return scale[..., None].expand(matrix.shape[:-1])


def nothing(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Place-holders of the right shapes that take no memory."""
    zero = matrix.new_zeros(())
    stretch = matrix.shape if keeps_rotated(matrix) else matrix.shape[:-1]
    return zero.expand(*matrix.shape[:-1], matrix.shape[-2]), zero.expand(stretch)
