"""The norm of a convolution as an operator on images, from above, with the rounding of its computation included."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthogonium._checks import as_tuple, check_floating
from orthogonium.linalg._convolution_axes import PADDING_MODES, Axis, conv_axes, paddings, transposed_axes
from orthogonium.linalg._eigenvalue_bound import common_eigenvalue_bound, largest_eigenvalue_bound
from orthogonium.linalg._kernel_gram import KernelGram, polyphase
from orthogonium.linalg._precision import raise_if_not_finite, scaled_to_one
from orthogonium.linalg._rounding import UP, frobenius_bound, gamma, in_float64, keeps_subnormals
from orthogonium.linalg.spectral_bound import unit_norm_bound

_WRITTEN_OUT = 1024  # inputs or outputs per group up to which the operator is written out
_ENTRIES = 2**22  # of the written-out operators of all groups
_BLOCK_ENTRIES = 2**19  # of the matrices of several frequencies held at once
_NEAR = 1 + 2e-5  # the squared norm over the mean squared singular value from which on a kernel counts as orthogonal
_LOOSENESS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)  # of a grid of frequencies, for images of any size
_TIGHT = 0.001  # what is given up on images of known size, while it costs no more than
_WORK_IF_KNOWN = 1e10  # multiplications; and otherwise, to be looser only beyond
_WORK = 1.5e8  # multiplications
_OVERHEAD = 10_000  # multiplications that take as long as one small block does besides


@dataclass(frozen=True)
class _Operator:
    """A convolution, with a kernel ``(groups, out, in, *k)`` of entries of size about one, and its axes."""

    kernel: Tensor
    axes: list[Axis]

    @property
    def stride(self) -> list[int]:
        return [axis.stride for axis in self.axes]

    @property
    def dilation(self) -> list[int]:
        return [axis.dilation for axis in self.axes]


def kernel_norm_bound(
    kernel: Tensor,
    image_size: Sequence[int] | int | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    *,
    stride_divides: bool = False,
) -> float:
    """Never below the operator norm of a convolution of torch in one to three dimensions, rounding included.

    With an image size, small operators are written out, and circular convolutions whose windows tile the image are
    taken frequency by frequency: both are tight, to about 3e-5. Large images with zero padding are put on a circle just
    large enough. For padding that repeats pixels, on large images, the bound is multiplied by the norm of the padding.
    Without an image size, the bound holds on every image that the convolution accepts; it is at most 2 % above the
    supremum over all of them, 0.05 % for small kernels, unless padding repeats pixels.

    Args:
        kernel: ``(out, in / groups, *k)``, of any real floating-point type; ``(in, out / groups, *k)`` if transposed.
        image_size: the sides of the input (of a transposed convolution: of its input likewise).
        stride, dilation, groups, output_padding: as in :class:`torch.nn.Conv2d` and
            :class:`torch.nn.ConvTranspose2d`.
        padding: integers, ``"valid"``, ``"same"`` (with a stride: the window's extent less the stride in total, the odd
            one behind), or pairs ``(before, after)``, one per axis.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``; the first two if transposed, where
            circular padding means the adjoint of a circular convolution.
        stride_divides: without ``image_size`` and with circular padding: only sides that the stride divides are meant
            (transposed: sides of the output). Around others windows overlap, which can double the squared norm.

    Returns:
        The bound; zero for zero and empty kernels, infinite where it leaves float64.

    Raises:
        TypeError: ``kernel`` is complex or not floating-point, or a size is no integer.
        NonFiniteError: ``kernel`` holds NaN or Inf.
        ValueError: sizes that do not fit together; the message says which.

    Source:
        Sedghi, Gupta and Long, "The singular values of convolutional layers", ICLR 2019, for frequencies; Ehlich and
        Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86, 1964, for grids of them; the docs' page
        on bounds for the proofs.
    """
    axes = _axes(
        kernel, image_size, stride, padding, dilation, groups, padding_mode, transposed, output_padding, stride_divides
    )
    exact = in_float64(kernel)
    if exact.numel() == 0 or not bool(exact.any()):
        return _hidden(kernel, axes)
    scaled, exponent = scaled_to_one(exact.flatten(1))
    grouped = scaled.view_as(exact).unflatten(0, (groups, -1))
    bound = _unit_bound(_Operator(grouped, axes))
    try:
        result = math.ldexp(bound, int(exponent))
    except OverflowError:
        return math.inf
    if math.ldexp(result, -int(exponent)) < bound:
        result = math.nextafter(result, math.inf)
    return (result + _hidden(kernel, axes)) * UP if _hidden(kernel, axes) else result


def absolute_kernel_norm_bound(
    kernel: Tensor,
    image_size: Sequence[int] | int | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    *,
    stride_divides: bool = False,
) -> float:
    """Never below the norm of the operator whose entries are the absolute values of the convolution's taps.

    On a circle its symbol is largest at frequency zero, where it is the sum of the taps' absolute values: one matrix.

    Args:
        kernel, image_size, stride, padding, dilation, groups, padding_mode, transposed, output_padding, stride_divides:
            as in :func:`kernel_norm_bound`, and the same errors.
    """
    axes = _axes(
        kernel, image_size, stride, padding, dilation, groups, padding_mode, transposed, output_padding, stride_divides
    )
    exact = in_float64(kernel).abs()
    if exact.numel() == 0:
        return 0.0
    scaled, exponent = scaled_to_one(exact.flatten(1))
    operator = _Operator(scaled.view_as(exact).unflatten(0, (groups, -1)), axes)
    phases, _ = polyphase(operator.kernel, operator.stride, operator.dilation)
    total = phases.flatten(3).sum(3) * (1 + 2 * gamma(math.prod(kernel.shape[2:]) + 2))
    repeats = math.prod(axis.circle()[1] for axis in axes)
    bound = float(unit_norm_bound(total).max()) * math.sqrt(repeats) * UP
    try:
        result = math.ldexp(bound, int(exponent)) if bool(scaled.any()) else 0.0
    except OverflowError:
        return math.inf
    hidden = _hidden(kernel, axes)
    return math.nextafter(result + hidden, math.inf) if result + hidden else 0.0


def _axes(
    kernel: Tensor,
    image_size: Sequence[int] | int | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    transposed: bool,
    output_padding: int | Sequence[int],
    stride_divides: bool,
) -> list[Axis]:
    """Every check of the arguments."""
    dims = kernel.ndim - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"kernel must be (out, in / groups, *k) in 1 to 3 dimensions, got {tuple(kernel.shape)}")
    check_floating("kernel", kernel)
    raise_if_not_finite("kernel", kernel)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an integer, got {groups!r}")
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(f"groups={groups} must divide the kernel's {kernel.shape[0]} channels along dimension 0")
    if padding_mode not in PADDING_MODES or (transposed and padding_mode in ("reflect", "replicate")):
        known = PADDING_MODES[:2] if transposed else PADDING_MODES
        raise ValueError(f"padding_mode must be one of {', '.join(known)}, got {padding_mode!r}")
    sides = None if image_size is None else as_tuple("image_size", image_size, dims, least=1)
    steps = as_tuple("stride", stride, dims, least=1)
    spread = as_tuple("dilation", dilation, dims, least=1)
    more = as_tuple("output_padding", output_padding, dims, least=0)
    sizes = tuple(kernel.shape[2:])
    if 0 in sizes:
        raise ValueError(f"kernel must have sides of at least 1, got {tuple(kernel.shape)}")
    pads = paddings(padding, [d * (k - 1) + 1 for k, d in zip(sizes, spread, strict=True)], steps)
    if not transposed:
        if any(more):
            raise ValueError(f"output_padding={output_padding!r} belongs to transposed convolutions. Leave it at 0")
        return conv_axes(sizes, sides, steps, pads, spread, padding_mode, stride_divides)
    return transposed_axes(sizes, sides, steps, pads, spread, padding_mode, stride_divides, more)


def _hidden(kernel: Tensor, axes: list[Axis]) -> float:
    """What entries can add that a device without subnormal numbers reads as zero."""
    if kernel.numel() == 0 or keeps_subnormals(kernel.device):
        return 0.0
    return kernel.numel() * math.prod(axis.circle()[1] for axis in axes) * torch.finfo(kernel.dtype).tiny


def _unit_bound(operator: _Operator) -> float:
    exact = all(axis.is_exact() for axis in operator.axes)
    if not exact and _fits_in_memory(operator):
        return _written_out_bound(operator)
    phases, dilation = polyphase(operator.kernel, operator.stride, operator.dilation)
    circles = [axis.circle() for axis in operator.axes]
    lengths = [None if n is None else n // axis.stride for (n, _), axis in zip(circles, operator.axes, strict=True)]
    squared = _circle_bound(KernelGram.of(phases), lengths, dilation)
    return math.sqrt(squared * UP) * math.sqrt(math.prod(m for _, m in circles)) * UP


def _fits_in_memory(operator: _Operator) -> bool:
    groups, out, inner = operator.kernel.shape[:3]
    if any(axis.side is None for axis in operator.axes):
        return False
    inputs = inner * math.prod(axis.side or 0 for axis in operator.axes)
    outputs = out * math.prod(axis.windows or 0 for axis in operator.axes)
    loose = any(axis.circle()[1] > 1 for axis in operator.axes)  # then it is worth more
    limit = 2 * _WRITTEN_OUT if loose else _WRITTEN_OUT
    return min(inputs, outputs) <= limit and groups * inputs * outputs <= _ENTRIES


def _written_out_bound(operator: _Operator) -> float:
    """By the verified bound on the matrix of each group, whose entries are sums of taps."""
    axes, written, sums = operator.axes, operator.kernel, 1.0
    for axis, place in enumerate(axes):  # (groups, out, in, *k) → (groups, out, in, *(windows, side))
        selection = place.selection().to(written.device)
        sums *= float(selection.sum(1).max())
        written = torch.tensordot(written, selection, dims=([3], [1]))
        assert written.ndim == 3 + len(axes) + axis + 1
    dims = len(axes)
    windows, sides = [3 + 2 * i for i in range(dims)], [4 + 2 * i for i in range(dims)]
    matrix = written.permute(0, 1, *windows, 2, *sides).flatten(2 + dims).flatten(1, 1 + dims)
    if sums == 0:
        return 0.0
    if sums == 1:  # each entry is a tap
        return float(unit_norm_bound(matrix).max())
    # sums of at most `taps` entries: off by γ |·|, and ‖Σ_t |op_t|‖_F ≤ √(windows · taps) ‖K‖_F
    taps = math.prod(operator.kernel.shape[3:])
    size = frobenius_bound(operator.kernel.flatten(2)) * math.sqrt(taps * math.prod(a.windows or 0 for a in axes))
    error = 2 * gamma(taps + 2) * size
    return float(((unit_norm_bound(matrix) + error) * UP).max())


def _circle_bound(gram: KernelGram, lengths: list[int | None], dilation: Sequence[int]) -> float:
    """Of the squared norm, on circles of these lengths, or on all (``None`` for every axis)."""
    near = float(gram.shift_bound())
    if near <= gram.mean() * _NEAR:
        return near
    if len(gram.shifts) == 1:
        return float(largest_eigenvalue_bound(gram.even[0], gram.error.expand(gram.groups)).max())
    circle, factor = _frequencies(gram, lengths)
    level = bound = 0.0
    for real, imag in gram.blocks(circle, dilation if factor == 1.0 else [1] * len(dilation), _BLOCK_ENTRIES):
        level, found = common_eigenvalue_bound(real, imag, gram.error, level)
        bound = max(bound, found)
    return min(bound * factor * UP, near)


def _frequencies(gram: KernelGram, lengths: list[int | None]) -> tuple[list[int], float]:
    """A grid of frequencies, and by how much ``G`` may be larger between them.

    For every vector ``v``, ``v* G(ω) v ≥ 0`` is a trigonometric polynomial of degree ``n`` along an axis. On a grid of
    ``M`` points per turn its maximum is at most the grid's over ``cos²(π n / 2M)``. The dilation drops out: it only
    makes ω go around several times.
    """
    work = gram.groups * (gram.channels**3 + _OVERHEAD) / 2
    exact = [n for n in lengths if n is not None]
    known = math.prod(exact) * work if len(exact) == len(lengths) else math.inf
    axes = sum(n > 0 for n in gram.degrees)
    for loose in _LOOSENESS:
        angle = math.acos((1 - loose) ** (1 / axes))
        grid = [math.ceil(math.pi * n / (2 * angle)) if n else 1 for n in gram.degrees]
        cost = math.prod(grid) * work
        if min(cost, known) <= (_WORK_IF_KNOWN if exact and loose <= _TIGHT else _WORK):
            break
    if known <= max(cost, _WORK):
        return exact, 1.0
    cosines = math.prod(math.cos(math.pi * n / (2 * m)) for n, m in zip(gram.degrees, grid, strict=True))
    return grid, (1 / cosines**2) * (1 + 2.0**-40)
