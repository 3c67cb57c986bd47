"""A test kit for layers with promises: assertions on the operator itself, and strategies for hypothesis.

The assertions need torch alone; the strategies import ``hypothesis`` when they are called.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthogonium import layers as og
from orthogonium.certification import lipschitz_bound, plain_network

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["assert_lipschitz", "assert_orthogonal", "kernels", "layers", "materialise", "matrices"]

_LARGEST = 2**26  # entries of an operator that is written out


def materialise(module: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """The matrix ``(outputs, inputs)`` of an affine module without its offset, in float64, from impulses.

    The weights are read once, in evaluation mode, and converted exactly; the module itself is left alone.

    Args:
        module: affine on inputs of this shape, of what :func:`~orthogonium.lipschitz_bound` can trace.
        input_shape: of one input, without the batch.

    Raises:
        ValueError: the operator has more than 2²⁶ entries, or the module is not affine.
    """
    network = plain_network(copy.deepcopy(module).eval())
    shape = tuple(input_shape)
    size = torch.Size(shape).numel()
    with torch.no_grad():
        offset = network(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        if offset.numel() * size > _LARGEST:
            raise ValueError(
                f"an operator of {offset.numel()} × {size} entries is too large. Use a smaller input_shape"
            )
        impulses = torch.eye(size, dtype=torch.float64).view(-1, *shape)
        columns = [network(part).flatten(1) - offset for part in impulses.split(256)]
        matrix = torch.cat(columns).mT if columns else offset.new_zeros(offset.numel(), 0)
        probe = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = probe.flatten(1) @ matrix.mT + offset
        error = float((network(probe).flatten(1) - expected).abs().max()) if size else 0.0
        scale = 1 + float(expected.abs().max() if expected.numel() else 0)
    if not error <= 1e-9 * scale:
        raise ValueError(
            f"{type(module).__name__} is not affine: a random input differs by {error:.3g} from the sum of its "
            f"impulse responses, so that it has no operator"
        )
    return matrix


def assert_lipschitz(
    module: nn.Module,
    input_shape: Sequence[int],
    bound: float = 1.0,
    *,
    rtol: float = 1e-6,
    points: int = 8,
    seed: int = 0,
) -> None:
    """Fail unless ``module`` is Lipschitz with constant ``bound``, as far as can be seen or proved.

    An affine module is written out in float64 and its largest singular value compared. Of any other, the slopes between
    random points and the norms of Jacobians there are, which can only show that a bound is wrong; where
    :func:`~orthogonium.lipschitz_bound` proves ``bound``, the test ends there.

    Args:
        module: maps ``(N, *input_shape)`` to ``(N, ...)``; tested in evaluation mode, on a copy.
        input_shape: of one input, without the batch.
        bound: the constant that is promised.
        rtol: relative excess to let pass, for the rounding of the weights.
        points: random inputs for modules that are not affine, of norms over several decades.
        seed: of these.

    Raises:
        AssertionError: the constant is exceeded; the message names the largest singular value or slope.
    """
    name = type(module).__name__
    network = plain_network(copy.deepcopy(module).eval())
    limit = bound * (1 + rtol)
    shape = tuple(input_shape)
    try:
        matrix = materialise(module, shape)
    except ValueError as error:
        if "not affine" not in str(error):
            raise
    else:
        sigma = float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0
        assert sigma <= limit, (
            f"{name} on inputs of shape {shape} has σ_max = {sigma:.9g}, above the promised {bound:.9g} "
            f"(operator of {matrix.shape[0]} × {matrix.shape[1]} in float64)"
        )
        return
    if _proved(module, shape) <= limit:
        return
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, points, dtype=torch.float64).view(-1, *(1,) * len(shape))
    x = torch.randn(points, *shape, generator=generator, dtype=torch.float64) * scales
    for number, point in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda p: network(p[None]).flatten(), point)
        slope = float(torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2))
        assert slope <= limit, (
            f"{name} on inputs of shape {shape} has a Jacobian with σ_max = {slope:.9g} at random point {number}, "
            f"above the promised {bound:.9g}"
        )
    near = x + 1e-3 * scales * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for other in (x.roll(1, 0), near):
        with torch.no_grad():
            apart = (network(x) - network(other)).flatten(1).norm(dim=1)
        slope = float((apart / (x - other).flatten(1).norm(dim=1).clamp_min(1e-300)).max())
        assert slope <= limit, (
            f"{name} on inputs of shape {shape} grows a distance by {slope:.9g}, above the promised {bound:.9g}"
        )


def _proved(module: nn.Module, shape: tuple[int, ...]) -> float:
    try:
        return lipschitz_bound(copy.deepcopy(module).eval(), shape).bound
    except TypeError:  # no rule: only slopes are left
        return float("inf")


def assert_orthogonal(
    module_or_matrix: nn.Module | Tensor, input_shape: Sequence[int] | None = None, *, atol: float | None = None
) -> None:
    """Fail unless all singular values are one: orthonormal rows or columns, whichever are fewer.

    Args:
        module_or_matrix: an affine module, which is written out in float64; or a matrix or batch of them.
        input_shape: of one input to the module, without the batch.
        atol: how far a singular value may be from one; by default ``8 √n ε`` with n the shorter side for a matrix and
            the longer one for an operator, and ε of the dtype of the matrix or of the module's parameters.

    Raises:
        AssertionError: a singular value is further from one; the message names the smallest and the largest.
        ValueError: a module without ``input_shape``, a tensor of fewer than two dimensions, or a module that is not
            affine.
    """
    if isinstance(module_or_matrix, Tensor):
        matrix, dtype, side = module_or_matrix.detach().double(), module_or_matrix.dtype, min
        name = f"the matrix of shape {tuple(matrix.shape)}"
        if matrix.ndim < 2:
            raise ValueError(f"a matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    else:
        if input_shape is None:
            raise ValueError("input_shape is needed to write out the operator of a module, e.g. (3, 8, 8)")
        matrix, side = materialise(module_or_matrix, input_shape), max
        dtype = next((p.dtype for p in module_or_matrix.parameters() if p.is_floating_point()), torch.float64)
        name = f"{type(module_or_matrix).__name__} on inputs of shape {tuple(input_shape)}"
    allowed = 8 * side(matrix.shape[-2:]) ** 0.5 * torch.finfo(dtype).eps if atol is None else atol
    values = torch.linalg.svdvals(matrix)
    if values.numel() == 0:
        return
    smallest, largest = float(values.min()), float(values.max())
    assert max(abs(largest - 1), abs(smallest - 1)) <= allowed, (
        f"{name} is not orthogonal: σ_max = {largest:.9g}, σ_min = {smallest:.9g}, further from one than {allowed:.2g}"
    )


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
