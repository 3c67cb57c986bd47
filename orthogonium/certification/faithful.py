"""The traced network against the model itself, at drawn inputs: what a trace cannot see shows there."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from orthogonium.certification.forward_error import SizeRecorder, forward_error
from orthogonium.certification.network import Network
from orthogonium.certification.program import run
from orthogonium.certification.rounding import BINARY64, Arithmetic, norms_up

_SCALES = (1.0, 8.0)
_SHARE = 0.01  # of a result: convolutions may be computed by transforms, or with fewer digits


def check_same_results(model: nn.Module, network: Network, input_shape: Sequence[int] | None) -> None:
    """Refuse a model that gives something else than what was traced of it, where the shape is known.

    A model can tell that it is being traced: it looks at the type of what it is given, or catches an error. Evaluating
    both at two inputs proves nothing, but shows most of these.

    Raises:
        TypeError: the results differ.
        ValueError: the model does not take an input of this shape.
    """
    held = [v for v in (*model.parameters(), *model.buffers()) if v.is_floating_point()]
    types = list(dict.fromkeys(v.dtype for v in held)) or [torch.float32, torch.float64]
    if input_shape is None or not {torch.float32, torch.float64}.issuperset(types) or (held and len(types) > 1):
        return
    drawn = torch.randn(len(_SCALES), *input_shape, generator=torch.Generator().manual_seed(0))
    drawn *= torch.tensor(_SCALES).view(-1, *(1,) * len(input_shape))
    result, dtype = _evaluated(model, drawn.to(held[0].device if held else "cpu"), types)
    expected, allowed = _expected(network, drawn.double(), dtype)
    off = torch.inf
    if isinstance(result, Tensor) and result.shape == expected.shape:
        apart = (result.to("cpu", torch.float64) - expected).reshape(len(drawn), -1).norm(dim=1)
        off = float(torch.where(apart > allowed, apart, 0.0).max())
    if off > 0:
        raise TypeError(
            f"the model gives other results than what was traced of it, by {off:.3g} at a drawn input. It may look at "
            f"the type of its input, or catch an error that a trace raises; do neither"
        )


def _evaluated(model: nn.Module, x: Tensor, types: Sequence[torch.dtype]) -> tuple[object, torch.dtype]:
    """What the model gives, in the first of these types that it takes."""
    for dtype in types:
        try:
            with torch.no_grad():
                return model(x.to(dtype)), dtype
        except (RuntimeError, ValueError, IndexError) as error:
            failure: Exception = error
    raise ValueError(f"the model cannot take an input of shape {tuple(x.shape)} and {types[-1]}: {failure}")


def _expected(network: Network, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far one in ``dtype`` may be from it: a guess where some rounding is not known."""
    assert network.output is not None
    values: dict[fx.Node, Tensor] = {}
    if any(step.response.rounding is None for step in network.steps.values()):
        run(network.program, x, results=values)
        rounding = 1e-3 * (network.bound * norms_up(x))
    else:
        recorder, here = SizeRecorder(network), torch.zeros(len(x), dtype=torch.float64)
        run(network.program, x, results=values, visit=recorder)
        fine = forward_error(network, recorder.sizes, here, BINARY64)
        coarse = forward_error(network, recorder.sizes, here, Arithmetic.of(dtype), fine)
        rounding = fine[network.output] + coarse[network.output]
    expected = values[network.output]
    return expected, rounding + _SHARE * norms_up(expected.reshape(len(x), -1))
