"""Rules for padding, which copies some entries, and cropping."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.rounding import sqrt_up
from orthogonium.certification.rules.pooling import impulses
from orthogonium.certification.rules.registry import EXACT, Refused, Response, Variable, filled, lipschitz_rule, number

_MODULES = {
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def _padded(x: Variable, pads: Sequence[int], mode: str, value: float = 0.0) -> Response:
    """The root of how often the most copied entry occurs: on each axis on its own, so the counts multiply."""
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]  # last axis first
    if x.shape is not None and len(pairs) >= len(x.shape):
        raise Refused(f"pads {len(pairs)} axes of an input of shape {('N', *x.shape[1:])}, the batch among them")
    if mode == "constant":
        if not math.isfinite(number(value, "value")):
            raise Refused(f"has value={value!r}. Use a finite one")
        return Response(1.0, filled(value))
    count = 1
    for axis, (before, after) in enumerate(pairs):
        if mode == "circular" and min(before, after) < 0 < max(before, after):
            left = x.known_shape("see what circular padding wraps")[-1 - axis] + min(before, after)
            if max(before, after) > left:
                raise Refused(
                    f"pads by {(before, after)} the {left} entries that it leaves, for which torch reads memory that "
                    f"nothing was written to. Crop first"
                )
        if x.shape is None:
            ends = (before > 0) + (after > 0) if mode in ("reflect", "circular") else max(0, before) + max(0, after)
            count *= 1 + ends
            continue

        def pad(eye: Tensor, before: int = before, after: int = after) -> Tensor:
            return F.pad(eye, (before, after), mode=mode)

        count *= int(impulses(pad, x.shape[-1 - axis]).sum(0).max())
    return Response(sqrt_up(count), EXACT)


def _register(mode: str) -> None:
    @lipschitz_rule(*_MODULES[mode], fresh=True)
    def _layer(module: Any, x: Variable) -> Response:
        return _padded(x, module.padding, mode, getattr(module, "value", 0.0))


for _mode in _MODULES:
    _register(_mode)


@lipschitz_rule(F.pad)
def _pad(input: Variable, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Response:
    if not all(isinstance(p, int) for p in pad):
        raise Refused(f"has pad={pad!r}: whole numbers are known")
    return _padded(input, pad, mode, value or 0.0)
