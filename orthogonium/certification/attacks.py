"""A search for adversarial inputs: what is truly reachable, against what is proved not to be."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttackResult:
    """``adversarial``: the inputs found, shaped like ``x``; where ``success`` ``(N,)`` is false, they
    are those that came closest. An input that is misclassified to begin with counts as a success."""

    adversarial: Tensor
    success: Tensor


def attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    eps: float,
    steps: int = 100,
    restarts: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> AttackResult:
    """Look for misclassified inputs at ℓ2 distance at most ``eps`` by projected gradient ascent.

    Ascent is on the margin, largest wrong logit less the right one, with normalised steps that shrink to
    zero along a cosine. The first start is ``x`` itself, the others are uniform in the ball. Inputs may
    leave the range of valid images, as certificates cover the whole space. What it finds is real; what it
    does not find proves nothing.

    Args:
        model: maps ``(N, ...)`` to ``(N, classes)``, or to one logit ``(N, 1)`` or ``(N,)`` whose sign is the class,
            and is differentiable; its parameters are left alone. Put it in evaluation mode.
            Pass :func:`~orthogonium.certification.plain_network` to save recomputing constraints.
        x: ``(N, ...)``, floating-point.
        labels: ``(N,)``, the right classes.
        eps: radius of the ball, at least 0.
        steps, restarts: gradient steps per start, and number of starts.
        step_size: length of the first step, by default ``eps / 4`` but at least ``5 eps / steps``.
        seed: of the random starts.

    Raises:
        TypeError: ``x`` is not floating-point, ``labels`` is, or ``eps`` is not one number.
        ValueError: ``labels`` is not ``(N,)`` or holds no class of the model, ``eps`` is negative or not finite, or a
            count is below one.

    Source:
        Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """
    if isinstance(eps, Tensor) and eps.ndim:
        raise TypeError(f"eps must be one radius for all inputs, got a tensor of shape {tuple(eps.shape)}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite radius of at least 0, got {eps}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {x.dtype}. Convert it, e.g. with x.float()")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape {tuple(x.shape[:1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must hold integer classes, got {labels.dtype}")
    labels = labels.long()  # in narrower types 1 − 2 label wraps around
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    first_step = max(eps / 4, 5 * eps / steps) if step_size is None else step_size
    generator = torch.Generator().manual_seed(seed)
    x = x.detach()
    with torch.no_grad():
        logits = model(x)
    _check_classes(labels, logits)
    best, best_gain = x.clone(), _gain(logits, labels)
    for restart in range(restarts):
        open_ = (best_gain < 0).nonzero().flatten()
        if eps == 0 or len(open_) == 0:
            break
        found, gain = _ascend(model, x[open_], labels[open_], eps, steps, first_step, restart, generator)
        better = gain > best_gain[open_]
        best[open_[better]], best_gain[open_[better]] = found[better], gain[better]
    return AttackResult(best, best_gain >= 0)


def _ascend(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    first_step: float,
    restart: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One start of projected ascent: the best inputs seen, and their gains."""
    shift = torch.zeros_like(x) if restart == 0 else _in_ball(x, eps, generator)
    best, best_gain = x.clone(), torch.full(labels.shape, -math.inf, dtype=x.dtype, device=x.device)
    for step in range(steps + 1):
        point = (x + shift).requires_grad_()
        gain = _gain(model(point), labels)
        better = gain.detach() > best_gain
        best[better], best_gain[better] = point.detach()[better], gain.detach()[better]
        if step == steps:
            break
        (slope,) = torch.autograd.grad(gain.sum(), point)
        length = first_step * (1 + math.cos(math.pi * step / steps)) / 2
        shift = _project(shift + length * slope / _norms(slope).clamp_min(1e-30), x, eps)
    return best, best_gain


def _check_classes(labels: Tensor, logits: Tensor) -> None:
    classes = 2 if logits.ndim == 1 else max(2, logits.shape[1])
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(f"labels must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")


def _gain(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the right one: not negative once the label no longer wins."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        return logits.flatten() * (1 - 2 * labels)
    right = logits.gather(1, labels[:, None])[:, 0]
    is_right = nn.functional.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_right, -math.inf).amax(1) - right


def _in_ball(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Points uniform in the ball of radius ``eps``, one per input."""
    draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    length = torch.rand(len(x), generator=generator, dtype=torch.float64) ** (1 / max(1, x[0].numel()))
    uniform = draw / _norms(draw) * length.view(-1, *[1] * (x.ndim - 1))
    return _project(eps * uniform.to(x), x, eps)


def _project(shift: Tensor, x: Tensor, eps: float) -> Tensor:
    """The nearest shift of length at most ``eps``, so far inside that the rounding of ``x + shift`` does not matter."""
    rounding = torch.finfo(shift.dtype).eps
    inside = (eps * (1 - 64 * rounding) - rounding / 2 * _norms(x)).clamp_min(0)
    return shift * (inside / _norms(shift).clamp_min(1e-30)).clamp_max(1)


def _norms(batch: Tensor) -> Tensor:
    return torch.linalg.vector_norm(batch.flatten(1), dim=1).view(-1, *[1] * (batch.ndim - 1))
