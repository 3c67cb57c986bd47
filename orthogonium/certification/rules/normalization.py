"""Rules for normalisation by fixed statistics."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium.certification.operators import vector_norm
from orthogonium.certification.rules.registry import (
    Refused,
    Response,
    Rounding,
    Variable,
    as_double,
    evaluate_only,
    lipschitz_rule,
)

_UP = 1 + 2.0**-45
_FAINT = 2.0**-60


def _normalised(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Response:
    """``(x − mean) · weight / √(variance + eps) + bias``, one scale per channel."""
    spread = as_double(variance) + eps
    if not (spread > 0).all():
        raise Refused(f"has a variance + eps of {float(spread.min()):.3g}, which must be positive")
    scale = spread.rsqrt() if weight is None else as_double(weight).abs() * spread.rsqrt()
    shift = scale * as_double(mean).abs() + (0.0 if bias is None else as_double(bias).abs())
    norm = float(scale.max()) * _UP
    if float(spread.min()) < _FAINT:  # which float32 may take for zero
        return Response(norm)
    return Response(norm, Rounding(16, norm, vector_norm(shift) * _UP, entries=shift.numel()))


@lipschitz_rule(
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    fresh=True,
)
def _layer(module: Any, x: Variable) -> Response:
    own = isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
    if own or module.running_mean is None or module.running_var is None:
        raise Refused(
            "computes statistics of its input, since it has track_running_stats=False: it has no useful constant. "
            "Use track_running_stats=True"
        )
    return _normalised(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


@lipschitz_rule(F.batch_norm, fresh=True)
def _batch_norm(
    input: Variable,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Response:
    evaluate_only(training, "batch_norm")
    if not isinstance(running_mean, Tensor) or not isinstance(running_var, Tensor):
        raise Refused("has no running statistics")
    if isinstance(weight, Variable) or isinstance(bias, Variable):
        raise Refused("has a weight or bias that depends on the network's input")
    return _normalised(running_mean, running_var, weight, bias, eps)


@lipschitz_rule(torch.batch_norm, torch.instance_norm)
def _low_level(*args: Any) -> Response:
    raise Refused("is called at a low level. Use torch.nn.functional.batch_norm")
