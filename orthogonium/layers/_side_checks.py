"""Image sides, checked by torch's own convolutions once their kernel is constrained."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from orthogonium.layers._targets import checks_sides, geometry_of


def check_sides_in_calls(module: nn.Module) -> None:
    """Let ``module``, just constrained, refuse image sides on which its circular windows would overlap.

    Only where the bound depends on sides and the module does not check them itself. The check stands in the class that
    torch made for the parametrized module, so it goes with the constraint, and is no hook.
    """
    if not isinstance(module, _ConvNd) or hasattr(module, "geometry"):
        return
    geometry = geometry_of(module)
    if not checks_sides(module, geometry):
        return
    dims, parametrized = len(geometry.stride), type(module)
    plain: Any = parametrized.__bases__[0]

    def _conv_forward(self: _ConvNd, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry.check_sides(tuple(input.shape[-dims:]))
        output: Tensor = plain._conv_forward(self, input, weight, bias)
        return output

    parametrized._conv_forward = _conv_forward  # type: ignore[method-assign]
