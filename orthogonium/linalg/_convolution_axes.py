"""What a convolution does along one axis: which input each window reads, and on which circle it can be studied.

Window ``p`` reads, by tap ``t``, the place ``s p + d t`` of the padded image; padding maps each place to an input
index, or to none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthogonium._checks import as_tuple

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution from ``side`` inputs to ``windows`` outputs; both ``None`` where any size is meant."""

    side: int | None
    windows: int | None
    kernel_size: int
    stride: int
    dilation: int
    before: int
    after: int
    mode: str
    divides: bool = False  # for any size: only sides that the stride divides

    @property
    def extent(self) -> int:
        """The length of a window."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def read(self) -> int:
        """How many places of the padded image the windows span."""
        assert self.windows is not None
        return self.stride * (self.windows - 1) + self.extent

    def source(self, place: int) -> int | None:
        """The input index that a place of the padded image shows; ``None`` for zero."""
        assert self.side is not None
        index, side = place - self.before, self.side
        if 0 <= index < side:
            return index
        if self.mode == "circular":
            return index % side
        if self.mode == "replicate":
            return min(max(index, 0), side - 1)
        if self.mode == "reflect":
            return -index if index < 0 else 2 * (side - 1) - index
        return None

    def circle(self) -> tuple[int | None, int]:
        """``(N, m)``: the operator's norm is at most ``√m`` times that of the convolution on a circle of length ``N``.

        Zero padding: an image on a circle that is long enough does not meet itself. A circular convolution whose
        stride divides the side is one on that circle, each window repeated at most ``m`` times. Any other padding is a
        map in front whose norm is ``√m``, with ``m`` the most places that show one input. ``N`` is ``None`` where only
        the supremum over all circles is known.
        """
        if self.side is None:
            return None, self._repeats_at_any_size()
        if self.mode == "zeros":
            # a window that meets no input gives zero, so more padding than that does not count
            before, after = min(self.before, self.extent - 1), min(self.after, self.extent - 1)
            length = self.side + max(before, after, before + after - self.extent + 1)
            return self._multiple(length), 1
        assert self.windows is not None
        if self.mode == "circular" and self.side % self.stride == 0:
            return self.side, -(-self.windows * self.stride // self.side)
        shown = Counter(self.source(place) for place in range(self.read))
        return self._multiple(self.read), max(shown.values())

    def is_exact(self) -> bool:
        """Whether the operator *is* the convolution on the circle."""
        tiles = self.mode == "circular" and self.side is not None and self.windows is not None
        return tiles and self.windows * self.stride == self.side  # type: ignore[operator]

    def _multiple(self, length: int) -> int:
        return -(-length // self.stride) * self.stride

    def _repeats_at_any_size(self) -> int:
        total = self.before + self.after
        if self.mode == "zeros" or total == 0:
            return 1
        if self.mode == "replicate":
            return 1 + total  # at a side of one
        if self.mode == "reflect":
            return 1 + (self.before > 0) + (self.after > 0)
        least = max(self.before, self.after, 1)  # torch refuses to wrap around more than once
        if self.stride == 1 or self.divides:
            fewest = -(-least // self.stride)
            more = (total - self.extent) // self.stride + 1  # windows beyond side / stride
            return max(1, -(-(fewest + more) // fewest))
        return -(-(least + total) // least)

    def selection(self) -> Tensor:
        """``(windows, kernel_size, side)``: one where a tap of a window reads an input."""
        assert self.side is not None
        assert self.windows is not None
        chosen = torch.zeros(self.windows, self.kernel_size, self.side, dtype=torch.float64)
        for window in range(self.windows):
            for tap in range(self.kernel_size):
                index = self.source(self.stride * window + self.dilation * tap)
                if index is not None:
                    chosen[window, tap, index] = 1.0
        return chosen


def paddings(
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]], extents: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, int]]:
    """``(before, after)`` per axis. ``"same"`` pads the window's extent less the stride in total, the odd one behind.

    Raises:
        ValueError: an unknown word, a negative padding, or another number of axes.
        TypeError: no integers.
    """
    dims = len(extents)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be 'same', 'valid', integers or pairs of them, got {padding!r}")
        totals = [max(0, e - s) if padding == "same" else 0 for e, s in zip(extents, stride, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, Sequence) and any(isinstance(pair, Sequence) for pair in padding):
        if len(padding) != dims:
            raise ValueError(f"padding must have {dims} entries, one per axis, got {padding!r}")
        pairs = [as_tuple("padding", pair, 2, least=0) for pair in padding]
        return [(before, after) for before, after in pairs]
    return [(p, p) for p in as_tuple("padding", padding, dims, least=0)]


def conv_axes(
    kernel_size: Sequence[int],
    image_size: Sequence[int] | None,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    mode: str,
    divides: bool,
) -> list[Axis]:
    """One per axis of a convolution on images of ``image_size``.

    Raises:
        ValueError: a side that holds no window, or that torch's padding refuses.
    """
    axes = []
    for i, (k, s, (before, after), d) in enumerate(zip(kernel_size, stride, pads, dilation, strict=True)):
        side = None if image_size is None else image_size[i]
        axis = Axis(side, None, k, s, d, before, after, mode, divides)
        if side is not None:
            windows = (side + before + after - axis.extent) // s + 1
            _check_side(i, side, windows, axis)
            axis = Axis(side, windows, k, s, d, before, after, mode, divides)
        axes.append(axis)
    return axes


def transposed_axes(
    kernel_size: Sequence[int],
    image_size: Sequence[int] | None,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    mode: str,
    divides: bool,
    more: Sequence[int],
) -> list[Axis]:
    """One per axis of the convolution whose adjoint takes features of ``image_size``.

    Raises:
        ValueError: features that leave no image, or an image around which they wrap more than once.
    """
    axes = []
    for i, (k, s, (before, after), d, extra) in enumerate(zip(kernel_size, stride, pads, dilation, more, strict=True)):
        windows = None if image_size is None else image_size[i]
        axis = Axis(None, windows, k, s, d, before, after, mode, divides)
        if windows is not None:
            side = (windows - 1) * s + axis.extent + extra - before - after
            axis = Axis(side, windows, k, s, d, before, after, mode, divides)
            _check_side(i, side, windows, axis)
        axes.append(axis)
    return axes


def _check_side(i: int, side: int, windows: int, axis: Axis) -> None:
    pads = (axis.before, axis.after)
    if side < 1 or windows < 1:
        raise ValueError(
            f"an image side of {side} (axis {i}) with padding {pads} holds {windows} windows of length {axis.extent}: "
            f"both must be at least 1"
        )
    limits = {"circular": side, "reflect": side - 1}
    if max(pads) > limits.get(axis.mode, max(pads)):
        raise ValueError(
            f"{axis.mode} padding {pads} (axis {i}) is not defined on an image side of {side}: it must be at most "
            f"{limits[axis.mode]}"
        )
