"""Strategies for ``hypothesis``, which is imported when they are called."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthogonium import layers as og

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def matrices(
    max_side: int = 8,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    max_condition: float = 1e8,
    max_scale: float = 1e30,
) -> "SearchStrategy[Tensor]":
    """A hypothesis strategy: ``(m, n)`` matrices of all shapes up to ``max_side``, conditions and scales.

    Singular values run from ``scale`` down to ``scale / condition``, on a logarithmic scale; some are of low rank.
    """
    from hypothesis import strategies as st

    return st.builds(
        _matrix,
        st.integers(1, max_side),
        st.integers(1, max_side),
        st.sampled_from(list(dtypes)),
        _exponents(max_condition),
        _exponents(max_scale, both_signs=True),
        st.integers(0, max_side),
        st.integers(0, 2**31 - 1),
    )


def kernels(
    dims: int = 2,
    max_channels: int = 4,
    max_kernel: int = 3,
    max_groups: int = 2,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> "SearchStrategy[tuple[Tensor, int]]":
    """A hypothesis strategy: convolution kernels ``(out, in / groups, *k)`` with their number of groups."""
    from hypothesis import strategies as st

    channels, sizes = st.integers(1, max_channels), st.tuples(*[st.integers(1, max_kernel)] * dims)
    groups, seeds = st.integers(1, max_groups), st.integers(0, 2**31 - 1)
    return st.builds(_kernel, channels, channels, sizes, groups, st.sampled_from(list(dtypes)), seeds)


def layers(
    max_features: int = 8, max_side: int = 6, dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)
) -> "SearchStrategy[tuple[nn.Module, tuple[int, ...]]]":
    """A hypothesis strategy: layers as training may leave them, each with the shape of one input.

    Plain linear and convolution layers of torch, and this library's pooling, normalisation, shuffles and residual
    blocks, with random parameters and statistics, in evaluation mode.
    """
    from hypothesis import strategies as st

    features, seeds = st.integers(1, max_features), st.integers(0, 2**31 - 1)
    dtype, flags = st.sampled_from(list(dtypes)), st.booleans()
    linear = st.builds(_linear, features, features, flags, dtype, seeds)
    small, sides = st.integers(1, 3), st.tuples(st.integers(3, max_side), st.integers(3, max_side))
    mode = st.sampled_from(["zeros", "circular", "reflect", "replicate"])
    groups = st.integers(1, 2)
    kin = st.builds(_kin, st.sampled_from(sorted(_KIN)), small, small, small, sides, flags, dtype, seeds)
    convolution = st.builds(
        _convolution, small, small, small, small, st.integers(0, 2), groups, mode, sides, dtype, seeds
    )
    return linear | convolution | kin


def _exponents(limit: float, both_signs: bool = False) -> "SearchStrategy[float]":
    from hypothesis import strategies as st

    largest = math.log10(limit)
    return st.floats(-largest if both_signs else 0.0, largest).map(lambda exponent: 10.0**exponent)


def _matrix(m: int, n: int, dtype: torch.dtype, condition: float, scale: float, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    values = condition ** -torch.linspace(0, 1, min(m, n), dtype=torch.float64)
    values[rank or min(m, n) :] = 0
    limit = torch.finfo(dtype).max / 4
    return ((u * values) @ vh * min(scale, limit)).to(dtype)


def _kernel(
    out: int, inner: int, sizes: tuple[int, ...], groups: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out * groups, inner, *sizes, generator=generator, dtype=torch.float64).to(dtype), groups


def _drawn(layer: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(drawn.square() if name.endswith("running_var") else drawn)
    return layer.eval()


def _linear(m: int, n: int, bias: bool, dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    return _drawn(nn.Linear(m, n, bias, dtype=dtype), seed), (m,)


def _convolution(
    inner: int,
    outer: int,
    kernel: int,
    stride: int,
    padding: int,
    groups: int,
    mode: Any,
    sides: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> tuple[nn.Module, tuple[int, ...]]:
    layer = nn.Conv2d(
        inner * groups, outer * groups, kernel, stride, padding, groups=groups, padding_mode=mode, dtype=dtype
    )
    return _drawn(layer, seed), (inner * groups, *sides)


# Each takes (channels, kernel or factor, hidden, sides, a flag) and gives a layer and the shape of one input.
_KIN: dict[str, Any] = {
    "ScaledAvgPool2d": lambda c, k, h, sides, flag: (og.ScaledAvgPool2d(k), (c, *sides)),
    "ScaledAvgPool1d": lambda c, k, h, sides, flag: (og.ScaledAvgPool1d(k), (c, sides[0])),
    "ScaledAvgPool3d": lambda c, k, h, sides, flag: (og.ScaledAvgPool3d((k, 1, h)), (c, 3, 2, 3)),
    "L2NormPool1d": lambda c, k, h, sides, flag: (og.L2NormPool1d(k), (c, sides[0])),
    "L2NormPool2d": lambda c, k, h, sides, flag: (og.L2NormPool2d(k), (c, *sides)),
    "L2NormPool3d": lambda c, k, h, sides, flag: (og.L2NormPool3d((k, 1, h)), (c, 3, 2, 3)),
    "InvertibleDownsampling2d": lambda c, k, h, sides, flag: (og.InvertibleDownsampling2d((k, h)), (c, 2 * k, h)),
    "InvertibleUpsampling2d": lambda c, k, h, sides, flag: (og.InvertibleUpsampling2d((k, h)), (c * k * h, *sides)),
    "BatchCentering": lambda c, k, h, sides, flag: (og.BatchCentering(c, bias=flag), (c, *sides)),
    "LipschitzBatchNorm": lambda c, k, h, sides, flag: (og.LipschitzBatchNorm(c, bias=flag), (c, *sides)),
    "LayerCentering": lambda c, k, h, sides, flag: (og.LayerCentering(sides, bias=flag), (c, *sides)),
    "ConvexResidual": lambda c, k, h, sides, flag: (og.ConvexResidual(nn.Linear(c, c, flag)), (h, c)),
    "SLLLinear": lambda c, k, h, sides, flag: (og.SLLLinear(c, h), (k, c)),
    "SLLConv1d": lambda c, k, h, sides, flag: (og.SLLConv1d(c, h, 2 * k - 1, _mode(flag)), (c, 3)),
    "SLLConv2d": lambda c, k, h, sides, flag: (og.SLLConv2d(c, h, 3, _mode(flag)), (c, *sides)),
    "SLLConv3d": lambda c, k, h, sides, flag: (og.SLLConv3d(c, h, (3, 1, 3), _mode(flag)), (c, 3, 1, 3)),
}


def _mode(circular: bool) -> str:
    return "circular" if circular else "zeros"


def _kin(
    name: str, channels: int, kernel: int, hidden: int, sides: tuple[int, int], flag: bool, dtype: Any, seed: int
) -> tuple[nn.Module, tuple[int, ...]]:
    layer, shape = _KIN[name](channels, kernel, hidden, sides, flag)
    return _drawn(layer.to(dtype), seed), shape
