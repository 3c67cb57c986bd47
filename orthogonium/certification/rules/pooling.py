"""Rules for pooling. Windows that overlap read an entry several times; the norms count that."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.operators import materialised_norm
from orthogonium.certification.rounding import sqrt_up, times_up
from orthogonium.certification.rules.registry import (
    EXACT,
    Refused,
    Response,
    Rounding,
    Variable,
    lipschitz_rule,
    sizes,
)


def impulses(function: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """The matrix ``(outputs, side)`` of a linear map of ``(side, 1, side)``, one impulse per sample."""
    return function(torch.eye(side, dtype=torch.float64)[:, None]).flatten(1).mT


def image_sides(x: Variable, dims: int) -> tuple[int, ...]:
    shape = x.known_shape("count windows")
    if len(shape) != dims + 2:
        raise Refused(f"takes (N, channels, {dims} sides), got {('N', *shape[1:])}")
    return shape[2:]


def most_windows(kernel: int, stride: int, dilation: int = 1) -> int:
    """How many windows read one position at most, on any image."""
    common = math.gcd(stride, dilation)
    return math.ceil(kernel * common / stride)


def _steps(stride: Any, spans: tuple[int, ...]) -> tuple[int, ...]:
    """Windows lie side by side where no stride is given, or an empty one."""
    return spans if stride is None or stride == [] or stride == () else sizes(stride, len(spans))


def _max_pool(x: Variable, dims: int, kernel: Any, stride: Any, padding: Any, dilation: Any, indices: bool) -> Response:
    """Each output moves at most as far as its window, and a position lies in so many windows."""
    if indices:
        raise Refused("returns indices, which jump. Use return_indices=False")
    spans = sizes(kernel, dims)
    steps = _steps(stride, spans)
    windows = zip(spans, steps, sizes(dilation, dims), strict=True)
    count = math.prod(most_windows(*window) for window in windows)
    return Response(sqrt_up(count), EXACT)


@lipschitz_rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, fresh=True)
def _max_pool_layer(module: Any, x: Variable) -> Response:
    dims = int(type(module).__name__[7]) if type(module) in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d) else 0
    dims = dims or next(d for d, c in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1) if isinstance(module, c))
    options = (module.kernel_size, module.stride, module.padding, module.dilation, module.return_indices)
    return _max_pool(x, dims, *options)


def _register_max_pool(dims: int, *functions: Any) -> None:
    @lipschitz_rule(*functions, fresh=True)
    def _rule(
        input: Variable,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Response:
        return _max_pool(input, dims, kernel_size, stride, padding, dilation, return_indices)


_register_max_pool(1, F.max_pool1d, torch.max_pool1d)
_register_max_pool(2, F.max_pool2d, torch.max_pool2d)
_register_max_pool(3, F.max_pool3d, torch.max_pool3d)


def _average_pool(
    x: Variable,
    dims: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Response:
    """A Kronecker product of one small matrix per axis, written out with torch's own windows and divisors."""
    spans = sizes(kernel, dims)
    steps = _steps(stride, spans)
    pads = sizes(padding, dims)
    scale = 1.0 if divisor is None else 1.0 / abs(divisor) * (1 + 2.0**-50)
    if x.shape is None:
        if ceil_mode or (not count_include_pad and any(pads)):
            x.known_shape("find the divisors at the border")
        if divisor is None:
            # ‖A‖² ≤ largest row sum (1) · largest column sum (windows / k) of a matrix without negative entries
            parts = [min(1.0, most_windows(k, s) / k) for k, s in zip(spans, steps, strict=True)]
        else:
            parts = [float(k * most_windows(k, s)) for k, s in zip(spans, steps, strict=True)]
        norm = times_up(sqrt_up(math.prod(parts) * (1 + 2.0**-48)), scale) if math.prod(parts) != 1 else scale
    else:
        matrices = []
        for side, k, s, p in zip(image_sides(x, dims), spans, steps, pads, strict=True):

            def pool(eye: Tensor, k: int = k, s: int = s, p: int = p) -> Tensor:
                options = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
                narrow = ((k, 1), (s, 1), (p, 0))
                return F.avg_pool2d(eye[..., None], *narrow, **options, divisor_override=None if divisor is None else 1)

            matrices.append(impulses(pool, side))
        norm = times_up(materialised_norm(matrices), scale) * (1 + 2.0**-48)
    return Response(norm, Rounding(math.prod(spans) + 3, norm))


@lipschitz_rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, fresh=True)
def _average_pool_layer(module: Any, x: Variable) -> Response:
    dims = next(d for d, c in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1) if isinstance(module, c))
    divisor = getattr(module, "divisor_override", None)
    options = (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad)
    return _average_pool(x, dims, *options, divisor)


def _register_average_pool(dims: int, *functions: Any) -> None:
    @lipschitz_rule(*functions, fresh=True)
    def _rule(
        input: Variable,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Response:
        options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return _average_pool(input, dims, *options)


_register_average_pool(1, F.avg_pool1d)
_register_average_pool(2, F.avg_pool2d)
_register_average_pool(3, F.avg_pool3d)


def _adaptive_matrices(x: Variable, dims: int, output_size: Any) -> list[Tensor]:
    sides = image_sides(x, dims)
    wanted = (output_size,) * dims if output_size is None or isinstance(output_size, int) else tuple(output_size)
    matrices = []
    for side, out in zip(sides, wanted, strict=True):

        def pool(eye: Tensor, out: int = side if out is None else out) -> Tensor:
            return F.adaptive_avg_pool1d(eye, out)

        matrices.append(impulses(pool, side))
    return matrices


def _adaptive_average(x: Variable, dims: int, output_size: Any) -> Response:
    matrices = _adaptive_matrices(x, dims, output_size)
    norm = materialised_norm(matrices) * (1 + 2.0**-48)
    terms = math.prod(int((m != 0).sum(1).max()) for m in matrices)
    return Response(norm, Rounding(terms + 3, norm))


def _adaptive_max(x: Variable, dims: int, output_size: Any, indices: bool = False) -> Response:
    if indices:
        raise Refused("returns indices, which jump. Use return_indices=False")
    matrices = _adaptive_matrices(x, dims, output_size)
    return Response(sqrt_up(math.prod(int((m != 0).sum(0).max()) for m in matrices)), EXACT)


_AVERAGES: Sequence[Any] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MAXIMA: Sequence[Any] = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


@lipschitz_rule(*_AVERAGES, fresh=True)
def _adaptive_average_layer(module: Any, x: Variable) -> Response:
    dims = next(d for d, c in enumerate(_AVERAGES, 1) if isinstance(module, c))
    return _adaptive_average(x, dims, module.output_size)


@lipschitz_rule(*_MAXIMA, fresh=True)
def _adaptive_max_layer(module: Any, x: Variable) -> Response:
    dims = next(d for d, c in enumerate(_MAXIMA, 1) if isinstance(module, c))
    return _adaptive_max(x, dims, module.output_size, module.return_indices)


def _register_adaptive(dims: int, average: Any, maximum: Any) -> None:
    @lipschitz_rule(*average, fresh=True)
    def _average(input: Variable, output_size: Any) -> Response:
        return _adaptive_average(input, dims, output_size)

    @lipschitz_rule(maximum, fresh=True)
    def _maximum(input: Variable, output_size: Any, return_indices: bool = False) -> Response:
        return _adaptive_max(input, dims, output_size, return_indices)


_register_adaptive(1, (F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d), F.adaptive_max_pool1d)
_register_adaptive(2, (F.adaptive_avg_pool2d,), F.adaptive_max_pool2d)
_register_adaptive(3, (F.adaptive_avg_pool3d,), F.adaptive_max_pool3d)


@lipschitz_rule(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, fresh=True)
def _power_pool_layer(module: Any, x: Variable) -> Response:
    """The ℓ2 norm of every window."""
    if module.norm_type not in (2, 2.0) or module.ceil_mode:
        raise Refused(
            f"has norm_type={module.norm_type}, ceil_mode={module.ceil_mode}. Known is norm_type=2 without ceil_mode, "
            f"which scales incomplete windows up"
        )
    dims = next(d for d, c in enumerate((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), 1) if isinstance(module, c))
    spans = sizes(module.kernel_size, dims)
    norm = sqrt_up(math.prod(map(most_windows, spans, _steps(module.stride, spans))))
    # squares underflow below the square root of the smallest number
    window = math.prod(spans)
    return Response(norm, Rounding(2 * window + 8, norm, constant=2.0**-60 * window, squares=True))
