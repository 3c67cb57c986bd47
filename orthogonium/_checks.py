"""Argument checks whose messages tell the reader what to change."""

from collections.abc import Sequence

from torch import Tensor


def check_matrix(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` has at least two dimensions."""
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
