"""Convolution kernels in one to three dimensions: compose them, take adjoints, build orthogonal ones from projectors.

A kernel ``K`` of shape ``(out, in, *k)`` maps ``x`` to ``(K x)[p] = Σ_t K[t] x[p + t]``, as
``torch.nn.functional.conv*d`` does. Composition is associative, the adjoint of a composition is the composition of the
adjoints in reverse, and a kernel is orthogonal when it composes with its adjoint to the identity.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(images: Tensor, kernel: Tensor, **keywords: Any) -> Tensor:
    """``torch.nn.functional.conv1d``, ``2d`` or ``3d``, by the kernel's dimensions."""
    return _CONVOLUTIONS[kernel.ndim - 2](images, kernel, **keywords)


def compose_kernels(outer: Tensor, inner: Tensor, groups: int = 1, stride: int | Sequence[int] = 1) -> Tensor:
    """The kernel of "first ``inner``, then ``outer``": ``C[t] = Σ_{s b + a = t} outer[b] inner[a]``.

    Args:
        outer: ``(out, middle / groups, *k)``.
        inner: ``(middle, in / groups, *j)``.
        groups: of both.
        stride: ``s``, that of ``inner``; the composition then moves by the product of both strides.

    Returns:
        ``(out, in / groups, *(s (k − 1) + j))``.

    Raises:
        ValueError: channels or dimensions that do not match.
    """
    dims = outer.ndim - 2
    if dims not in _CONVOLUTIONS or inner.ndim != outer.ndim:
        raise ValueError(
            f"kernels must both be (out, in, *k) in 1 to 3 dimensions, got {tuple(outer.shape)}, {tuple(inner.shape)}"
        )
    if outer.shape[1] * groups != inner.shape[0] or outer.shape[0] % groups or inner.shape[0] % groups:
        raise ValueError(
            f"outer reads {outer.shape[1]} x {groups} groups of channels and inner writes {inner.shape[0]}"
        )
    strides = (stride,) * dims if isinstance(stride, int) else tuple(stride)
    if any(s > 1 for s in strides):
        outer = _spread(outer, strides)
    padding = [k - 1 for k in outer.shape[2:]]
    reversed_outer = outer.flip(tuple(range(2, outer.ndim)))
    full = convolve(inner.transpose(0, 1), reversed_outer, padding=padding, groups=groups)
    return full.transpose(0, 1).contiguous()


def _spread(kernel: Tensor, strides: Sequence[int]) -> Tensor:
    """Zeros between taps."""
    sides = [(k - 1) * s + 1 for k, s in zip(kernel.shape[2:], strides, strict=True)]
    wide = kernel.new_zeros((*kernel.shape[:2], *sides))
    every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in strides))
    wide[every] = kernel
    return wide


def adjoint_kernel(kernel: Tensor, groups: int = 1) -> Tensor:
    """The kernel of the adjoint at stride one, up to a shift: ``(in, out / groups, *k)``."""
    split = kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return split.flip(tuple(range(2, kernel.ndim))).contiguous()


def identity_kernel(
    channels: int,
    kernel_size: Sequence[int],
    groups: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``(channels, channels / groups, *k)``: one at the centre tap ``(k − 1) // 2`` of each axis, zero elsewhere."""
    if channels % groups:
        raise ValueError(f"groups={groups} does not divide {channels} channels")
    kernel = torch.zeros(channels, channels // groups, *kernel_size, dtype=dtype, device=device)
    rows = torch.arange(channels, device=device)
    entries: tuple[Any, ...] = (rows, rows % (channels // groups), *((k - 1) // 2 for k in kernel_size))
    kernel[entries] = 1.0
    return kernel


def multiply_by_projector_taps(start: Tensor, frames: Tensor, axes: Sequence[int]) -> Tensor:
    """Compose a kernel with one two-tap kernel ``[P, I − P]`` after another, ``P = U Uᵀ``.

    Each ``[P, I − P]`` is orthogonal, since ``P (I − P) = 0``, so an orthogonal start stays orthogonal; it grows by
    one along the tap's axis. ``P X`` is computed as ``U (Uᵀ X)`` for the taps that exist: no padding zeros are
    multiplied, no projector is formed. Every part is differentiable to any order; layers in training use
    :func:`orthogonium.parametrizations.kernel_assembly.kernel_of_free_frames`, which computes the same in fewer calls.

    Args:
        start: ``(groups, c, *k, n)``: channels to multiply, kernel sides, whatever is carried along.
        frames: ``(taps, groups, c, r)``, ``U`` of each tap, orthonormal columns.
        axes: for each tap, the kernel axis that it grows: 0 to ``d − 1``.

    Returns:
        ``(groups, c, *(k + number of taps along each axis), n)``.

    Source:
        Xiao et al., "Dynamical isometry and a mean field theory of CNNs", ICML 2018; Li et al., "Preventing gradient
        attenuation in Lipschitz constrained convolutional networks", NeurIPS 2019.
    """
    x = start
    for frame, axis in zip(frames.unbind(0), axes, strict=True) if len(axes) else ():
        near = (frame @ (frame.mT @ x.flatten(2))).view_as(x)
        zero = torch.zeros_like(x.narrow(axis + 2, 0, 1))
        x = torch.cat((near, zero), axis + 2) + torch.cat((zero, x - near), axis + 2)
    return x
