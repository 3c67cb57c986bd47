"""Norms of a convolution on images of any size, from above, with the rounding of their own computation included."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from orthogonium.certification.matrix_norms import _UP, _frobenius_upper_bound, gamma

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _kernel_norm_upper_bound(kernel: Tensor, stride: tuple[int, ...], groups: int) -> float:
    """Never below the operator norm of a convolution under zero padding, or circular where the stride divides the
    sides.

    A stride turns into more input channels, one per position modulo the stride. With ``E`` the autocorrelation of that
    kernel, on the side with fewer channels, less ``μ`` times the identity, ``‖K‖² ≤ μ + Σ_t ‖E[t]‖_F``: each shift is
    unitary or a part of one. For an orthogonal kernel that is one to rounding.

    Args:
        kernel: ``(out, in / groups, *k)``, of any floating-point type.
        stride: per axis; the dilation does not matter at stride one, and must be one otherwise.
        groups: of channels; the bound is their largest.
    """
    exact = kernel.detach().to(device="cpu", dtype=torch.float64)
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    half = exponent // 2
    exact = exact * 2.0**-half * 2.0 ** (half - exponent)
    bound = max(_group_norm(group) for group in _polyphase(exact, stride).chunk(groups))
    return math.nextafter(math.ldexp(math.sqrt(bound) * _UP, exponent), math.inf)


def _polyphase(kernel: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``(out, in · Π stride, *⌈k / stride⌉)``."""
    margins: list[int] = []
    for k, s in zip(reversed(kernel.shape[2:]), reversed(stride), strict=True):
        margins += [0, -k % s]
    split = F.pad(kernel, margins)
    for axis, s in enumerate(stride):
        split = split.unflatten(2 + 2 * axis, (-1, s)).movedim(3 + 2 * axis, 2 + 2 * axis)
    dims = len(stride)
    phases = [2 + 2 * axis for axis in range(dims)]
    return split.permute(0, 1, *phases, *(p + 1 for p in phases)).flatten(1, 1 + dims)


def _group_norm(kernel: Tensor) -> float:
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1)
    sides = kernel.shape[2:]
    correlation = _CONVOLUTIONS[len(sides)](kernel, kernel, padding=[k - 1 for k in sides]).flatten(2)
    centre = correlation.shape[2] // 2
    middle = float(correlation[:, :, centre].diagonal().mean())
    correlation[:, :, centre].diagonal().sub_(middle)
    total = sum(_frobenius_upper_bound(part) for part in correlation.unbind(2)) * (1 + 2.0**-40)
    # |fl(K ⋆ K) − K ⋆ K| ≤ γ |K| ⋆ |K|, whose Frobenius norms sum to at most (Σ_t ‖K[t]‖_F)²
    terms = kernel[0].numel() + 2
    taps = sum(_frobenius_upper_bound(part) for part in kernel.flatten(2).unbind(2))
    return (middle + total + 4 * gamma(terms) * taps**2 + 2.0**-900) * _UP


def _absolute_kernel_norm_upper_bound(kernel: Tensor, groups: int) -> float:
    """Never below the norm of the convolution with ``|K|``: √(largest row sum · largest column sum)."""
    exact = kernel.detach().to(device="cpu", dtype=torch.float64).abs()
    slack = 1 + 2 * gamma(exact.numel() + 2)
    rows = float(exact.flatten(1).sum(1).max())
    columns = float(exact.unflatten(0, (groups, -1)).flatten(3).sum((1, 3)).max())
    return math.sqrt(rows * slack) * math.sqrt(columns * slack) * _UP
