"""The norm of an orthogonal convolution on every image that it accepts, from the factors of its kernel."""

import math

from torch import Tensor

from orthogonium.linalg import spectral_norm_bound
from orthogonium.linalg._rounding import UP, frobenius_bound, gamma, in_float64
from orthogonium.parametrizations.kernel import KernelPlan


def orthogonal_kernel_bound(weight: Tensor, stride: tuple[int, ...], groups: int) -> float:
    """Never below the norm of a convolution whose windows read no position twice with their core, at any image size.

    The kernel is taken apart into a matrix ``M`` and two-tap kernels ``[U Uᵀ, I − U Uᵀ]``, and put together again. On a
    circle of any length, and on a line, a two-tap kernel has norm at most ``1 + 2 (‖U‖² − 1)`` where ``‖U‖ ≥ 1``; the
    core, whose windows are disjoint, has that of ``M``. What is left of the weight is added tap by tap. For a weight
    that such factors made that is its rounding; for any other it is large, but the bound holds.

    Args:
        weight: ``(out, in / groups, *k)``, finite; of a transposed convolution its own weight likewise.
        stride: per axis.
        groups: of channels.

    Returns:
        The bound, one to rounding for an orthogonal kernel.
    """
    exact = in_float64(weight)
    plan = KernelPlan(exact.shape[0] // groups, exact.shape[1], tuple(exact.shape[2:]), stride, groups)
    if exact.numel() == 0:
        return 0.0
    matrix, frames = plan.take_apart(exact)
    rest = exact - plan.assemble(matrix, frames)
    core = float(spectral_norm_bound(matrix).max())
    size = float(frobenius_bound(matrix).max())
    taps, error = 1.0, 0.0
    if frames is not None:
        widths = spectral_norm_bound(frames).square().amax(1) * UP
        taps = math.prod(1 + 2 * max(0.0, float(width) - 1) * UP for width in widths) * (1 + gamma(2 * len(widths)))
        # one step of the assembly is off by γ |U||Uᵀ||X| and three roundings; the later steps enlarge that by `taps`
        share = float(frobenius_bound(frames).square().max())
        error = len(frames) * 4 * gamma(2 * plan.middle + 8) * (1 + share)
        error *= taps**2 * (1 + error) ** len(frames)
    assembled = error * size * math.sqrt(math.prod(plan.kernel_size))
    # the difference itself is rounded, relative to its own entries
    left = frobenius_bound(rest.unflatten(0, (groups, -1)).flatten(3).movedim(3, 0)).sum(0).max()
    return (core * taps + float(left) * (1 + gamma(rest.numel() + 2)) + assembled) * UP
