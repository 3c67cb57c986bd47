"""When an orthogonal kernel exists, how much padding it takes, and which image sides keep the bound.

Along one axis, with kernel size ``k``, stride ``s`` and dilation ``d``, an orthogonal kernel is a *core* of ``m =
min(k, s)`` taps after taps at stride one. The latter are orthogonal on a circle of any length ``N``; the core's window
number ``p`` reads the positions ``(s p + d r) mod N`` for ``r < m``. Its windows keep the norm as long as no position
is read twice, and tile the circle when every position is read once. Everything below follows from counting those
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orthogonium._checks import as_tuple


def reads_twice(side: int, windows: int, kernel_size: int, stride: int, dilation: int) -> bool:
    """Whether ``(s p + d r) mod side`` repeats for ``p < windows`` and ``r < min(k, s)``, by solving for each gap."""
    core = min(kernel_size, stride)
    common = max(d for d in range(1, stride + 1) if stride % d == 0 and side % d == 0)  # traceable, unlike math.gcd
    if windows > 1 and side // common < windows:
        return True  # two windows start at one position
    furthest = stride * (windows - 1)
    for apart in range(1, core):
        gap = (dilation * apart) % side
        for wrapped in range(gap - (furthest + gap) // side * side, furthest + 1, side):
            if wrapped % stride == 0 and abs(wrapped) <= furthest:
                return True
    return False


@dataclass(frozen=True)
class ConvGeometry:
    """The spatial side of a convolution: windows, padding, and which image sides keep the bound.

    Attributes:
        kernel_size, stride, dilation: per axis.
        pads: ``(before, after)`` per axis.
        circular: circular padding, otherwise zeros.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    circular: bool

    @classmethod
    def make(
        cls,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        padding: str | int | Sequence[int],
        padding_mode: str,
    ) -> "ConvGeometry":
        """From the constructor arguments of a torch convolution.

        Raises:
            ValueError: an unknown padding, or one under which windows overlap across the border on every image.
        """
        if padding_mode not in ("circular", "zeros"):
            known = padding_mode in ("reflect", "replicate")
            reason = "repeats pixels, which multiplies norms by up to 2" if known else "is unknown"
            raise ValueError(f"padding_mode={padding_mode!r} {reason}. Use 'circular' or 'zeros'.")
        dims = len(kernel_size)
        extents = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        if padding == "same":
            totals = [max(0, extent - s) for extent, s in zip(extents, stride, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        elif padding == "valid":
            pads = ((0, 0),) * dims
        elif isinstance(padding, str):
            raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
        else:
            pads = tuple((p, p) for p in as_tuple("padding", padding, dims, least=0))
        geometry = cls(kernel_size, stride, dilation, pads, padding_mode == "circular")
        for axis, (extent, s) in enumerate(zip(extents, stride, strict=True)):
            large = s * (extent + sum(pads[axis]))
            if not any(geometry.fits(axis, side) for side in range(large, large + s)):
                raise ValueError(
                    f"circular padding {pads[axis]} with kernel_size={kernel_size[axis]}, stride={s}, "
                    f"dilation={dilation[axis]} (axis {axis}) makes windows overlap across the border of every image, "
                    f"which can double the norm. Use padding='same', which pads {max(0, extent - s)} in total, at most "
                    f"{extent - 1} in total, or padding_mode='zeros'."
                )
        return geometry

    def extent(self, axis: int) -> int:
        """The length of a window."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1

    def windows(self, axis: int, side: int) -> int:
        """How many windows an image side holds."""
        return (side + sum(self.pads[axis]) - self.extent(axis)) // self.stride[axis] + 1

    def fits(self, axis: int, side: int, windows: int | None = None) -> bool:
        """Whether an image side keeps the bound (``windows`` of them, by default as many as it holds)."""
        windows = self.windows(axis, side) if windows is None else windows
        if windows < 1 or side < 1:
            return False
        if not self.circular or self.pads[axis] == (0, 0):
            return True
        if max(self.pads[axis]) > side:
            return False  # the border would wrap around more than once
        if self.stride[axis] == 1:
            return windows <= side
        return not reads_twice(side, windows, self.kernel_size[axis], self.stride[axis], self.dilation[axis])

    def is_tiled(self, sides: Sequence[int]) -> bool:
        """Whether windows read every position once: all singular values of the operator are then one."""
        return self.circular and all(
            self.fits(axis, side)
            and self.kernel_size[axis] >= self.stride[axis]
            and self.windows(axis, side) * self.stride[axis] == side
            for axis, side in enumerate(sides)
        )

    def check_sides(self, sides: Sequence[int]) -> None:
        """Raise ``ValueError`` unless each image side keeps the bound; plain integer arithmetic."""
        for axis, side in enumerate(sides):
            if not self.fits(axis, side):
                raise ValueError(self._reason(axis, side, self.windows(axis, side)))

    def _reason(self, axis: int, side: int, windows: int) -> str:
        k, s, pads = self.kernel_size[axis], self.stride[axis], self.pads[axis]
        text = f"an image side of {side} (axis {axis}) with kernel_size={k}, stride={s}, "
        text += f"dilation={self.dilation[axis]}, {'circular' if self.circular else 'zero'} padding {pads} "
        if windows < 1:
            text += f"holds no window of length {self.extent(axis)}. "
        elif max(pads) > side:
            text += "wraps around more than once. "
        else:
            text += f"has {windows} windows that overlap across the border: the norm would exceed one. "
        near = sorted(range(1, 2 * side + 2 * s + 2 * self.extent(axis)), key=lambda other: abs(other - side))
        good = sorted([other for other in near if self.fits(axis, other)][:2])
        text += f"Sides that fit: {', '.join(map(str, good))}. " if good else ""
        return text + "Or use padding='same' or padding_mode='zeros'."
