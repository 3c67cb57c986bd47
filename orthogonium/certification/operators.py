"""Norms of the linear maps that rules meet, as numbers rounded up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthogonium.certification.kernel_norms import _absolute_kernel_norm_upper_bound, _kernel_norm_upper_bound
from orthogonium.certification.matrix_norms import (
    _absolute_norm_upper_bound,
    _norm_upper_bound,
    _row_distances_upper_bound,
)
from orthogonium.certification.rounding import gamma, sqrt_up, times_up


def matrix_norm(matrix: Tensor) -> float:
    """Never below the largest singular value of ``(m, n)``."""
    return _norm_upper_bound(matrix)


def absolute_matrix_norm(matrix: Tensor) -> float:
    """Never below the norm of the matrix of absolute values."""
    return _absolute_norm_upper_bound(matrix)


def vector_norm(vector: Tensor) -> float:
    """Never below ``‖v‖₂`` of a tensor of any shape."""
    return _norm_upper_bound(vector.detach().reshape(1, -1)) if vector.numel() else 0.0


def row_distances(matrix: Tensor) -> Tensor:
    """Never below ``‖w_i − w_j‖``, for all pairs of rows of ``(m, n)``: ``(m, m)``, float64."""
    return _row_distances_upper_bound(matrix)


def kernel_norms(
    kernel: Tensor,
    sides: Sequence[int] | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[float, float]:
    """Bounds on the norms of a zero-padded convolution and of that with ``|K|``."""
    if all(s == 1 or d == 1 for s, d in zip(stride, dilation, strict=True)):
        norm = _kernel_norm_upper_bound(kernel, stride, groups)
    else:
        norm = sum(max(matrix_norm(tap) for tap in taps.chunk(groups)) for taps in kernel.flatten(2).unbind(2))
        norm *= 1 + 2 * gamma(kernel[0, 0].numel() + 2)
    return norm, _absolute_kernel_norm_upper_bound(kernel, groups)


def module_norms(module: nn.Module, shape: Sequence[int] | None) -> tuple[float, float]:
    """Bounds on ``‖W‖₂`` and ``‖ |W| ‖₂`` of a linear or convolution layer, for one input of ``shape`` if given."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Linear):
        return matrix_norm(weight), absolute_matrix_norm(weight)
    assert isinstance(module, nn.modules.conv._ConvNd)
    kernel = weight.detach()
    norm, absolute = kernel_norms(kernel, None, module.stride, (0,), module.dilation, module.groups)
    if module.padding_mode not in ("zeros",) and not hasattr(module, "geometry"):
        factor = 3.0 ** (len(module.stride) / 2)
        norm, absolute = times_up(norm, factor), times_up(absolute, factor)
    geometry = getattr(module, "geometry", None)
    if geometry is not None and geometry.circular and shape is not None and not module.transposed:
        sides = tuple(shape)[-len(module.stride) :]
        if any(n % s for n, s in zip(sides, geometry.stride, strict=True)):
            copies = math.prod(1 + (before > 0) + (after > 0) for before, after in geometry.pads)
            norm, absolute = times_up(norm, sqrt_up(copies)), times_up(absolute, sqrt_up(copies))
    return norm, absolute


def materialised_norm(matrices: Sequence[Tensor]) -> float:
    """The norm of a Kronecker product of small matrices, one per axis."""
    total = 1.0
    for matrix in matrices:
        if matrix.eq(torch.eye(*matrix.shape, dtype=matrix.dtype)).all():
            continue
        total = times_up(total, matrix_norm(matrix))
    return total
