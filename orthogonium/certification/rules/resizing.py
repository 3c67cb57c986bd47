"""Rules for changing the size of images: every axis is a small matrix."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.operators import materialised_norm
from orthogonium.certification.rounding import sqrt_up
from orthogonium.certification.rules.pooling import impulses
from orthogonium.certification.rules.registry import EXACT, Refused, Response, Rounding, Variable, lipschitz_rule

_NEAREST = ("nearest", "nearest-exact")
_LINEAR = ("linear", "bilinear", "trilinear")


@lipschitz_rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, fresh=True)
def _upsample(module: nn.Upsample, x: Variable) -> Response:
    options = (module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor)
    return _interpolate(x, *options)


@lipschitz_rule(F.interpolate, F.upsample, fresh=True)
def _interpolate(
    input: Variable,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Response:
    if mode not in (*_NEAREST, *_LINEAR) or antialias:
        raise Refused(f"has mode={mode!r}, antialias={antialias}. Known are {_NEAREST + _LINEAR} without antialias")
    sides = input.known_shape("count copies")[2:]
    total, terms, absolute = 1.0, 16, 1.0
    for axis, side in enumerate(sides):
        out = size[axis] if isinstance(size, tuple | list) else size
        factor = scale_factor[axis] if isinstance(scale_factor, tuple | list) else scale_factor

        def resize(eye: Tensor, out: Any = out, factor: Any = factor) -> Tensor:
            name = "linear" if mode in _LINEAR else mode
            return F.interpolate(eye, out, factor, name, align_corners, recompute_scale_factor)

        matrix = impulses(resize, side)
        if mode in _NEAREST:
            total *= int(matrix.sum(0).max())
            continue
        # The weights are computed from positions, off by a few roundings of the side, in at most two places per
        # output and 2 (out/in + 1) per input.
        reads = math.sqrt(2 * (2 * matrix.shape[0] / side + 2)) * (1 + 2.0**-40)
        total *= (materialised_norm([matrix]) + 16 * max(matrix.shape) * 2.0**-53 * reads) * (1 + 2.0**-48)
        terms, absolute = terms + 16 * max(matrix.shape), absolute * reads
    if mode in _NEAREST:
        return Response(sqrt_up(total), EXACT)
    return Response(total, Rounding(terms, absolute))
