"""Argument checks whose messages tell the reader what to change."""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

from torch import Tensor


def check_matrix(name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor, ``ValueError`` unless it has at least two dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}. Convert it with torch.as_tensor")
    if value.ndim < 2:
        raise ValueError(f"{name} must have shape (..., m, n), got {tuple(value.shape)}")


def check_floating(name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` holds real floating-point numbers."""
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be a real floating-point tensor, got {value.dtype}. "
            f"Convert it first, for example with {name}.float()."
        )


def check_weight_shape(weight_shape: Sequence[int]) -> tuple[int, ...]:
    """``weight_shape`` as a tuple; ``ValueError`` unless it is ``(..., m, n)`` with no negative side."""
    shape = tuple(int(side) for side in weight_shape)
    if len(shape) < 2:
        raise ValueError(f"weight_shape must be (..., m, n), got {shape}")
    if any(side < 0 for side in shape):
        raise ValueError(f"weight_shape must not have a negative side, got {shape}")
    return shape


def check_same_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` has that shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is a non-negative integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def as_tuple(name: str, value: object, dims: int, least: int) -> tuple[int, ...]:
    """``value`` once per axis.

    Raises:
        TypeError: neither an integer nor a sequence of them.
        ValueError: another number of axes, or an entry below ``least``.
    """
    entries: tuple[Any, ...] = (value,) * dims
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = tuple(value)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"{name} must be an integer or {dims} of them, got {value!r}")
    if len(entries) == 1:
        entries *= dims
    if len(entries) != dims:
        raise ValueError(f"{name} must have {dims} entries, one per axis, got {value!r}")
    if min(entries) < least:
        raise ValueError(f"{name} must be at least {least} along each axis, got {value!r}")
    return entries


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Raise unless these are positive integers and ``groups`` divides both numbers of channels."""
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if in_channels % groups or out_channels % groups:
        common = [g for g in range(1, groups) if in_channels % g == 0 and out_channels % g == 0]
        raise ValueError(
            f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}. "
            f"Smaller numbers that do: {', '.join(map(str, common))}"
        )


def check_kernel_exists(
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    """Raise ``ValueError`` if no kernel of this shape, stride and dilation is orthogonal.

    Counted per group: a window's core reads ``in · Π min(k, s)`` numbers and writes ``out``. Where the kernel is
    shorter than the stride some inputs are read by no window, so distances cannot be kept; there must not be more
    outputs than numbers read. A dilation with a factor in common with the stride makes windows share positions or skip
    some.

    Source: Achour, Malgouyres and Mamalet, "Existence, stability and scalability of orthogonal convolutional neural
    networks", JMLR 23(347), 2022, for square windows and circular padding; counting gives the rest.
    """
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        common = gcd(s, d)
        if k > 1 and common > 1:
            raise ValueError(
                f"no orthogonal kernel is built for kernel_size={k}, stride={s}, dilation={d} (axis {axis}): stride "
                f"and dilation share the factor {common}, so windows read one position in {common}. Use a dilation "
                f"without a common factor, or take every {common}th position first and use stride {s // common} and "
                f"dilation {d // common}."
            )
    room = in_channels * prod(min(k, s) for k, s in zip(kernel_size, stride, strict=True))
    if any(k < s for k, s in zip(kernel_size, stride, strict=True)) and out_channels > room:
        per_group = f" per group ({groups} groups)" if groups > 1 else ""
        raise ValueError(
            f"no orthogonal kernel maps {in_channels} to {out_channels} channels{per_group} with "
            f"kernel_size={kernel_size} and stride={stride}: the windows skip inputs and leave room for {room} "
            f"channels. Use kernel_size of at least {stride} or at most {room} channels{per_group} on that side."
        )
