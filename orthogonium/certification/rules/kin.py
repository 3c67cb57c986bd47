"""Rules for this library's pooling, normalisation, shuffles and residual blocks.

A :class:`~orthogonium.layers.ConvexResidual` needs none: it is looked into, and ``torch.lerp`` has one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from orthogonium.certification.operators import vector_norm
from orthogonium.certification.rules.linear import check_features, check_image
from orthogonium.certification.rules.pooling import image_sides
from orthogonium.certification.rules.registry import EXACT, Refused, Response, Rounding, Variable, lipschitz_rule
from orthogonium.layers import InvertibleDownsampling2d, InvertibleUpsampling2d
from orthogonium.layers.normalization import BatchCentering, LayerCentering, LipschitzBatchNorm
from orthogonium.layers.pooling import _L2NormPool, _ScaledAvgPool
from orthogonium.layers.recurrent import OrthoGRU, OrthoLSTM, OrthoRNN
from orthogonium.layers.residual import _SLL, SLLLinear, _SLLConv
from orthogonium.linalg import absolute_kernel_norm_bound, spectral_norm_bound
from orthogonium.linalg._rounding import TINY, UP, gamma

_UP = 1 + 2.0**-45
_FAINT, _HUGE = 2.0**-60, 2.0**60  # between them neither squares nor quotients leave float32
_RANGE = 80.0  # of logarithms whose exponentials stay normal numbers in float32


@lipschitz_rule(_ScaledAvgPool, fresh=True)
def _scaled_average(module: _ScaledAvgPool, x: Variable) -> Response:
    """Orthonormal rows, of one sign: the absolute values have norm one too."""
    _check_sides(x, module._dims)
    return Response(1.0, Rounding(math.prod(module.kernel_size) + 4, 1.0))


@lipschitz_rule(_L2NormPool, fresh=True)
def _norm_pool(module: _L2NormPool, x: Variable) -> Response:
    """A window's norm moves at most as far as the window. Small squares underflow, by less than the constant."""
    _check_sides(x, module._dims)
    window = math.prod(module.kernel_size)
    return Response(1.0, Rounding(window + 8, 1.0, constant=2.0**-60 * window, squares=True))


def _check_sides(x: Variable, dims: int) -> None:
    if x.shape is not None:
        image_sides(x, dims)


@lipschitz_rule(InvertibleDownsampling2d, InvertibleUpsampling2d)
def _moved(module: Any, x: Variable) -> Response:
    _check_sides(x, 2)
    return Response(1.0, EXACT)


@lipschitz_rule(BatchCentering, fresh=True)
def _centred(module: BatchCentering, x: Variable) -> Response:
    """A shift in evaluation."""
    _check_channels(x, module.num_features)
    shift = module.running_mean.abs() + (0.0 if module.bias is None else module.bias.abs())
    return Response(1.0, Rounding(4, 1.0, vector_norm(shift) * _UP, shift.numel()))


@lipschitz_rule(LipschitzBatchNorm, fresh=True)
def _scaled(module: LipschitzBatchNorm, x: Variable) -> Response:
    """One factor per channel, divided by the largest where that exceeds one."""
    _check_channels(x, module.num_features)
    spread = module.running_var + module.eps
    if not (spread > 0).all():
        raise Refused(f"has a variance + eps of {float(spread.min()):.3g}, which must be positive")
    factors = module.weight.abs() * spread.rsqrt()
    largest = float(factors.max()) * _UP
    factors = factors * _UP / max(1.0, largest / _UP**2)
    norm = min(1.0, largest)
    shift = factors * module.running_mean.abs() + (0.0 if module.bias is None else module.bias.abs())
    fits = float(spread.min()) >= _FAINT and largest <= _HUGE and (norm == 0 or norm >= _FAINT)
    rounding = Rounding(20, norm, vector_norm(shift) * _UP, shift.numel()) if fits else None
    return Response(norm, rounding)


def _check_channels(x: Variable, channels: int) -> None:
    if x.shape is not None and (len(x.shape) < 2 or x.shape[1] != channels):
        raise Refused(f"takes (N, {channels}, ...), got {('N', *x.shape[1:])}")


@lipschitz_rule(LayerCentering, fresh=True)
def _layer_centred(module: LayerCentering, x: Variable) -> Response:
    """An orthogonal projection, onto zero if there is one entry only."""
    shape, wanted = x.known_shape("see that the batch is not mixed"), module.normalized_shape
    if len(shape) <= len(wanted) or shape[-len(wanted) :] != wanted:
        raise Refused(f"takes (N, ..., {', '.join(map(str, wanted))}), got {('N', *shape[1:])}")
    count = math.prod(wanted)
    offset = 0.0 if module.bias is None else vector_norm(module.bias)
    return Response(1.0 if count > 1 else 0.0, Rounding(count + 6, 2.0, offset, count))


@lipschitz_rule(SLLLinear, fresh=True)
def _dense_block(module: SLLLinear, x: Variable) -> Response:
    check_features(x, module.features)
    weight = module.weight
    return _block(module, weight.abs() @ weight.abs().mT, lambda scaled: float(spectral_norm_bound(scaled)))


@lipschitz_rule(_SLLConv, fresh=True)
def _convolutional_block(module: _SLLConv, x: Variable) -> Response:
    check_image(x, module.channels, module._dims)
    half = tuple(k // 2 for k in module.kernel_size)

    def norm(scaled: Tensor) -> float:
        return absolute_kernel_norm_bound(scaled, padding=half, padding_mode=module.padding_mode)

    return _block(module, module._overlaps(module.weight.abs()), norm)


def _block(module: _SLL, absolute: Tensor, norm: Any) -> Response:
    """``x − Wᵀ S ReLU(W x + b)`` with the diagonal ``S`` that the block computes from its weights, whatever that is.

    The Jacobian is ``I − Wᵀ D S W`` with ``0 ⪯ D ⪯ I``. With ``W Wᵀ`` of entries at most ``G_ij`` in absolute value (on
    images, of symbols; zero padding restricts that operator), and for any ``q > 0``, the norm of ``Wᵀ S W`` is at most
    the largest row sum of ``S q⁻¹ G q``, call it m: the Jacobian's eigenvalues lie in [1 − m, 1].

    ``absolute`` is ``|W| |W|ᵀ``, what the rounding of ``W Wᵀ`` is relative to; ``norm`` bounds that of ``|W|``.
    """
    weight, hidden = module.weight, module.weight.shape[0]
    reads, inner = weight[0].numel(), math.prod(2 * k - 1 for k in weight.shape[2:])
    gram = module._interactions()
    steps = module._steps(gram)
    logarithms = module.log_q - module.log_q.amax()
    q = torch.exp(logarithms).clamp_min(1e-200)
    slack = gamma(reads + inner + 2) * absolute * UP + reads * inner * TINY
    rows = ((gram + slack) * q).sum(-1) / q * (1 + 2 * gamma(hidden + 8))
    largest = float(torch.where(steps > 0, steps * rows, 0.0).max()) * UP
    if not math.isfinite(largest):
        raise Refused("has weights of sizes so different that its steps leave float64. Normalise them")
    lipschitz = max(1.0, math.nextafter(largest - 1, math.inf))
    # What rounding does to a step is relative to |W| |W|ᵀ, which cancellation may leave far above W Wᵀ.
    alive = steps > 0
    inflated = torch.where(alive, (absolute * q).sum(-1) / (gram * q).sum(-1), 1.0)
    spans, sizes = float(-logarithms.min()), torch.where(alive, steps, 1.0)
    fits = spans <= _RANGE and float(sizes.min()) >= _FAINT and float(sizes.max()) <= _HUGE
    fits = fits and bool((alive | ~weight.flatten(1).any(1)).all())
    if not fits:
        return Response(lipschitz)
    in_steps = 2 * (math.ceil(float(inflated.max()) * _UP) * reads + hidden * inner + 2 * (math.ceil(spans) + 10) + 6)
    terms = reads + hidden * math.prod(weight.shape[2:]) + 8
    if in_steps > 2**22:  # a rounding of one half in float32
        return Response(lipschitz)
    # γ_t a + γ_s b ≤ γ_(s+t) (t a + s b) / (s + t): sums grow with |W|, steps with Wᵀ S W; 1.5 for both at once
    roots = steps.sqrt() * UP
    sums = 1 + norm(weight.abs() * roots.view(-1, *(1,) * (weight.ndim - 1)) * UP) ** 2 * _UP
    constant = (weight.abs().flatten(2).sum(-1) if weight.ndim > 2 else weight.abs()).mT @ (steps * module.bias.abs())
    scaled_bias = vector_norm(roots * module.bias) * math.sqrt(largest) * _UP
    share = in_steps / (terms + in_steps)
    absolute_norm = (1.5 * (1 - share) * sums + share * largest) * _UP
    offset = (1.5 * (1 - share) * vector_norm(constant) + share * scaled_bias) * _UP
    # what underflows in W x is multiplied by ‖Wᵀ S‖ ≤ √(m S), below 2³¹ here; S W x may be that much above the result
    lost = 2.0**-90 * (terms + in_steps) * hidden
    return Response(lipschitz, Rounding(terms + in_steps, absolute_norm, offset, constant.numel(), lost, squares=True))


@lipschitz_rule(OrthoRNN, OrthoLSTM, OrthoGRU)
def _recurrent(module: Any, *inputs: Any) -> Response:
    gated = "multiplies states by gates that depend on the input, and " if not isinstance(module, OrthoRNN) else ""
    raise Refused(
        f"{gated}returns a sequence and a state that has read all of it: its slope depends on the state and on how "
        f"many steps it takes, whatever the norm of its matrices. Certify the layers after it, from features that you "
        f"take as the input"
    )
