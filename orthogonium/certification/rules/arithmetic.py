"""Rules for sums, products with constants, reductions and comparisons."""

import math
import operator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from orthogonium.certification.rounding import sqrt_up, times_up
from orthogonium.certification.rules.registry import (
    EXACT,
    Refused,
    Response,
    Rounding,
    Unknown,
    Variable,
    as_double,
    lipschitz_rule,
    no_dtype,
    number,
)


def _spread(*operands: Any) -> list[float]:
    """Per operand that varies, how much broadcasting to the common shape grows its norm."""
    varying = [o for o in operands if isinstance(o, Variable)]
    tensors = [o for o in operands if isinstance(o, Variable | Tensor)]
    for operand in operands:
        if isinstance(operand, Unknown):
            number(operand, "factor")
    if len(tensors) == 1 or (len(varying) == 1 and all(isinstance(t, Variable) or t.ndim == 0 for t in tensors)):
        return [1.0]
    shapes = [t.known_shape("see what is broadcast") if isinstance(t, Variable) else tuple(t.shape) for t in tensors]
    common = torch.broadcast_shapes(*shapes)
    factors = []
    for variable in varying:
        shape = variable.known_shape("see what is broadcast")
        if len(shape) != len(common):
            raise Refused(
                f"broadcasts an input of shape {shape} to {tuple(common)}, which adds an axis before the batch"
            )
        factors.append(sqrt_up(math.prod(common[1:]) / max(1, math.prod(shape[1:]))))
    return factors


def _finite(value: Tensor) -> Tensor:
    if value.is_complex():
        raise Refused("has a complex constant; bounds are for real networks")
    if not torch.isfinite(value).all():
        raise Refused("has a constant with NaN or infinite entries")
    return as_double(value)


def _sizes_of(operand: Any, name: str) -> tuple[float, float, int]:
    """Largest and smallest absolute entry, and number of entries, of a constant."""
    if isinstance(operand, Tensor):
        entries = _finite(operand).abs()
        return float(entries.max()), float(entries.min()), operand.numel()
    value = abs(number(operand, name))
    if not math.isfinite(value):
        raise Refused(f"has {name}={value}")
    return value, value, 1


@lipschitz_rule(operator.add, torch.add, operator.iadd, "add", "__add__", "__radd__", fresh=True)
@lipschitz_rule(operator.sub, torch.sub, operator.isub, torch.subtract, "sub", "__sub__", fresh=True)
@lipschitz_rule(torch.rsub, "__rsub__", fresh=True)
def _sum(left: Any, right: Any, *, alpha: Any = 1) -> Response:
    if alpha != 1:
        raise Refused(f"has alpha={alpha}. Multiply beforehand")
    factors = _spread(left, right)
    offset, entries = 0.0, 1
    for operand in (left, right):
        if not isinstance(operand, Variable):
            offset = _sizes_of(operand, "summand")[0]
    return Response(tuple(factors), Rounding(2, tuple(factors), offset, entries))


@lipschitz_rule(operator.mul, torch.mul, torch.multiply, operator.imul, "mul", "__mul__", "__rmul__", fresh=True)
def _product(left: Any, right: Any) -> Response:
    if isinstance(left, Variable) and isinstance(right, Variable):
        raise Refused("multiplies two tensors that both depend on the network's input, which is not Lipschitz")
    (factor,) = _spread(left, right)
    largest, smallest, _ = _sizes_of(right if isinstance(left, Variable) else left, "factor")
    norm = times_up(largest, factor)
    return Response(norm, EXACT if largest == smallest == factor == 1 else Rounding(2, norm))


@lipschitz_rule(operator.truediv, torch.div, torch.true_divide, operator.itruediv, "div", "__truediv__", fresh=True)
def _quotient(left: Any, right: Any, *, rounding_mode: Any = None) -> Response:
    if isinstance(right, Variable):
        raise Refused("divides by a tensor that depends on the network's input, which is not Lipschitz")
    if rounding_mode is not None:
        raise Refused(f"has rounding_mode={rounding_mode!r}, which jumps")
    (factor,) = _spread(left, right)
    _, smallest, _ = _sizes_of(right, "divisor")
    if smallest == 0:
        raise Refused("divides by zero")
    norm = times_up(math.nextafter(1 / smallest, math.inf), factor)
    return Response(norm, Rounding(3, norm))


@lipschitz_rule(torch.lerp, "lerp", fresh=True)
def _interpolation(start: Any, end: Any, weight: Any) -> Response:
    """``(1 − w) start + w end``. torch computes it from the nearer end, which adds at most half the difference."""
    if isinstance(weight, Variable):
        raise Refused("interpolates by a weight that depends on the network's input, a product of two such")
    weight = weight if isinstance(weight, Tensor) else torch.tensor(number(weight, "weight"), dtype=torch.float64)
    shares = _finite(weight).flatten()
    rest = 1 - shares
    if not all(Fraction(r) == 1 - Fraction(w) for r, w in zip(rest.tolist(), shares.tolist(), strict=True)):
        rest = rest * (1 + 2.0**-52) + 2.0**-60
    parts = ((start, float(rest.abs().max())), (end, float(shares.abs().max())))
    factors = _spread(start, end, *([weight] if weight.ndim else []))
    varying = [share for operand, share in parts if isinstance(operand, Variable)]
    norms = tuple(times_up(share, factor) for share, factor in zip(varying, factors, strict=True))
    offset = sum(_sizes_of(o, "end")[0] for o, _ in parts if not isinstance(o, Variable))
    largest = max(1.0, *(share for _, share in parts))
    return Response(norms, Rounding(6, tuple(2 * largest * factor for factor in factors), 2 * largest * offset))


@lipschitz_rule(operator.neg, operator.pos, operator.abs)
def _sign(x: Variable) -> Response:
    return Response(1.0, EXACT)


@lipschitz_rule(operator.pow)
def _power(x: Any, exponent: Any) -> Response:
    raise Refused(f"raises to the power {exponent!r}, which has an unbounded slope or is not known here")


@lipschitz_rule(torch.maximum, torch.minimum, "maximum", "minimum", fresh=True)
def _extremum(left: Any, right: Any) -> Response:
    """``|max(a, b) − max(a', b')| ≤ max(|a − a'|, |b − b'|)``."""
    return Response(tuple(_spread(left, right)), EXACT, stacked=True)


def _axes(x: Variable, dim: Any) -> list[int]:
    if dim is None:
        raise Refused("reduces all axes, the batch among them. Say which with dim")
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [x.axis(d) for d in dims]


@lipschitz_rule(torch.mean, "mean", fresh=True)
def _mean(x: Variable, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Response:
    no_dtype(dtype)
    count = x.length(*_axes(x, dim))
    norm = math.nextafter(1 / math.sqrt(count), 1) if count > 1 else 1.0
    return Response(norm, Rounding(count + 2, norm))


@lipschitz_rule(torch.sum, "sum", fresh=True)
def _total(x: Variable, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Response:
    no_dtype(dtype)
    count = x.length(*_axes(x, dim))
    norm = sqrt_up(count)
    return Response(norm, Rounding(count + 1, norm))


@lipschitz_rule(torch.amax, torch.amin, "amax", "amin", fresh=True)
def _largest(x: Variable, dim: Any = None, keepdim: bool = False) -> Response:
    _axes(x, dim)
    return Response(1.0, EXACT)


@lipschitz_rule(torch.sort, "sort", fresh=True)
def _sorted(x: Variable, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Response:
    """The values; ``rules.shapes`` refuses the indices of these pairs."""
    x.axis(dim)
    return Response(1.0, EXACT)


@lipschitz_rule(torch.topk, "topk", fresh=True)
def _topk(x: Variable, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Response:
    x.axis(dim)
    if sorted is not True:
        raise Refused(f"has sorted={sorted}: entries in no fixed order change places, which jumps. Leave sorted out")
    return Response(1.0, EXACT)


@lipschitz_rule(torch.max, torch.min, "max", "min", fresh=True)
def _max(x: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Response:
    other = dim if isinstance(dim, Variable | Tensor) else other
    if other is not None:
        return _extremum(x, other)
    _axes(x, dim)
    return Response(1.0, EXACT)


@lipschitz_rule(torch.linalg.vector_norm, torch.norm, "norm", fresh=True)
def _norm(x: Variable, *args: Any, **kwargs: Any) -> Response:
    names = ("ord", "dim", "keepdim")
    if len(args) > len(names):
        raise Refused(f"has {len(args) + 1} arguments by position. Give those after keepdim by name")
    given = dict(zip(names, args, strict=False)) | kwargs
    no_dtype(given.get("dtype"))
    order = given.get("ord", given.get("p", 2))
    if order not in (2, 2.0):
        raise Refused(f"is the norm of order {order!r}; the one of order 2 is known")
    count = x.length(*_axes(x, given.get("dim")))
    return Response(1.0, Rounding(count + 4, 1.0, constant=2.0**-60 * count, squares=True))
