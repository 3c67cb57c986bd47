"""Predictions that cannot change within a radius, rounding included."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthogonium.certification.matrix_norms import _row_distances_upper_bound
from orthogonium.certification.sequential import Link, product, read_sequential
from orthogonium.layers import GroupSort
from orthogonium.linalg._rounding import gamma

_ROUNDOFF = 2.0**-53
_DOWN = 1 - 2.0**-48
_FARTHEST = 2.0**20  # times the size of the input: farther out, rounding alone could decide


@dataclass(frozen=True)
class Certificate:
    """What is proved about each input, for the network evaluated in float64.

    ``prediction`` ``(N,)``: the class of the largest logit. ``radius`` ``(N,)``, float64: every input at
    ℓ2 distance at most ``radius`` has the same prediction. ``margin`` ``(N,)``: the logit of the class in
    question less the largest other one. ``lipschitz``: an upper bound on the constant of the network.
    """

    prediction: Tensor
    radius: Tensor
    margin: Tensor
    lipschitz: float


def certify(model: nn.Module, x: Tensor, labels: Tensor | None = None) -> Certificate:
    """Prove, for each input, a radius within which the prediction cannot change.

    Let the last layer be ``z = W h + b`` after features ``h`` of Lipschitz constant ``L``. A change of the
    input by δ changes ``z_i − z_j`` by at most ``‖w_i − w_j‖ L ‖δ‖``, so class i stays on top while, for
    every j, ``‖δ‖ < (z_i − z_j) / (‖w_i − w_j‖ L)``. This holds everywhere in the input space, not
    only for valid images. A float64 evaluation differs from the exact one by at most D per logit, both
    here and at the attacked input, so 4 D is taken off each margin first; the quotient is rounded down.

    The statement is about the network with the weights as the model computes them, evaluated in float64
    in any order of summation. Inputs are certified as they are given: scaling them beforehand
    scales the radius.

    Args:
        model: a :class:`torch.nn.Sequential` in evaluation mode that maps ``(N, ...)`` to ``(N,
            classes)``, of the modules that
            :func:`~orthogonium.certification.sequential.read_sequential` knows.
        x: ``(N, ...)``, floating-point.
        labels: ``(N,)``, integer classes. With them, ``margin`` is that of the label, negative where the
            prediction is wrong, and ``radius`` is zero there.

    Returns:
        A :class:`Certificate`. Ties, NaN and infinities have radius zero.

    Raises:
        TypeError: ``x`` is not floating-point, ``labels`` not integer, or a module is not known.
        ValueError: the model is in training mode, gives fewer than two logits, or shapes do not match.

    Source:
        Tsuzuku, Sato and Sugiyama, "Lipschitz-margin training", NeurIPS 2018, for margins; Higham,
        "Accuracy and Stability of Numerical Algorithms", 2002, section 3.5, for D.
    """
    return _certify(read_sequential(model), x, labels)


def certified_accuracy(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    eps: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
) -> dict[float, float]:
    """The share of inputs that are classified correctly and certified at each radius.

    Args:
        model: as in :func:`certify`.
        data: ``(x, labels)``, or an iterable of such pairs, for example a DataLoader.
        eps: ℓ2 radii, not negative; at 0 the result is the clean accuracy.

    Returns:
        ``{radius: fraction}`` in the order of ``eps``.

    Raises:
        ValueError: a radius is negative or NaN, or there are no data; and all errors of :func:`certify`.
    """
    for radius in eps:
        if not radius >= 0:
            raise ValueError(f"eps must hold radii of at least 0, got {radius}")
    links = read_sequential(model)
    pairs = [data] if isinstance(data, tuple) and isinstance(data[0], Tensor) else data
    counts, total = dict.fromkeys(eps, 0), 0
    for x, labels in pairs:
        certificate = _certify(links, x, labels)
        correct = certificate.prediction == labels.to(certificate.prediction.device)
        for radius in eps:
            counts[radius] += int((correct & (certificate.radius >= radius)).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("data holds no inputs, so there is no accuracy")
    return {radius: counts[radius] / total for radius in eps}


def _certify(links: list[Link], x: Tensor, labels: Tensor | None) -> Certificate:
    if not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {x.dtype}. Convert it, e.g. with x.float()")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, ...), got {tuple(x.shape)}. For one input use x[None]")
    x = x.detach().to(device="cpu", dtype=torch.float64)
    logits, positions = _evaluate(links, x)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the model must give (N, classes) with at least 2 classes, got {tuple(logits.shape)}. "
            f"A single logit has no other class to compare with"
        )
    prediction = logits.argmax(1)
    subject = prediction if labels is None else _checked_labels(labels, logits)
    gaps = logits.gather(1, subject[:, None]) - logits
    distances, feature_bound = _last_layer(links, logits.shape[1])
    reach = distances[subject] * feature_bound * (1 + 2 * _ROUNDOFF)  # how fast each gap can close
    is_subject = torch.nn.functional.one_hot(subject, logits.shape[1]).bool()
    margin = gaps.masked_fill(is_subject, math.inf).amin(1)
    # The error at an attacked input is bounded through its norm: at most that of x plus the radius.
    terms = math.prod(x.shape[1:])
    size = torch.linalg.vector_norm(x.flatten(1), dim=1) * (1 + 2 * gamma(terms + 2))
    exact = _radius(gaps, reach, is_subject, torch.zeros_like(size)).clamp_max(_FARTHEST * (1 + size))
    error = _forward_error(links, positions, size + exact)
    radius = torch.minimum(exact, _radius(gaps, reach, is_subject, error))
    certain = torch.isfinite(logits).all(1) & torch.isfinite(error)
    return Certificate(prediction, torch.where(certain, radius, 0.0), margin, product(links))


def _evaluate(links: list[Link], x: Tensor) -> tuple[Tensor, list[int]]:
    """The logits in float64, and after each link the number of positions that share its bias.

    Each layer must treat ``(N, features)`` row by row, as the bounds assume.
    """
    positions = []
    with torch.no_grad():
        for link in links:
            if isinstance(link.plain, nn.Linear) and x.shape[1:] != (link.plain.in_features,):
                raise ValueError(
                    f"{link.path} ({link.kind}) takes (N, {link.plain.in_features}), got {tuple(x.shape)}. "
                    f"Reshape x, or put a Flatten first"
                )
            if isinstance(link.plain, GroupSort) and link.plain.dim == -x.ndim:
                raise ValueError(f"{link.path} ({link.kind}) has dim={-x.ndim}, which mixes the batch here")
            if isinstance(link.plain, nn.Flatten) and link.plain.start_dim == -x.ndim:
                raise ValueError(f"{link.path} (Flatten) has start_dim={-x.ndim}, which merges the batch here")
            x = link.plain(x)
            positions.append(math.prod(x.shape[2:]))
    return x, positions


def _radius(gaps: Tensor, reach: Tensor, is_subject: Tensor, error: Tensor) -> Tensor:
    """``min over j of (gap − 4 D) / reach``, rounded down: ``(N,)``, never negative."""
    room = (gaps - gaps.abs() * _ROUNDOFF * 2 - 4 * error[:, None]) * _DOWN
    radius = torch.where(reach > 0, room / reach, torch.where(room > 0, math.inf, 0.0))
    radius = radius.masked_fill(is_subject, math.inf).amin(1) * _DOWN
    return radius.nan_to_num(nan=0.0, posinf=math.inf).clamp_min(0)


def _last_layer(links: list[Link], classes: int) -> tuple[Tensor, float]:
    """Bounds on ``‖w_i − w_j‖`` of a final linear layer, and on the Lipschitz constant before it.

    After any other last layer, the difference of two logits moves at most √2 times as far as all of them.
    """
    last = links[-1].plain if links else None
    if isinstance(last, nn.Linear):
        return _row_distances_upper_bound(last.weight), product(links[:-1])
    distances = torch.full((classes, classes), math.sqrt(2) * (1 + 4 * _ROUNDOFF), dtype=torch.float64)
    return distances, product(links)


def _forward_error(links: list[Link], positions: list[int], size: Tensor) -> Tensor:
    """A bound D on how far float64 logits are from exact ones, for inputs of norm at most ``size``: ``(N,)``.

    Through ``W x + b``, in sums of n terms, an input of norm r known up to D becomes known up to
    ``‖W‖ D + κ (‖|W|‖ (r + D) + ‖b‖)``, with ``κ = γ_n + u (1 + γ_n)``. Sorting adds nothing.
    """
    error = torch.zeros_like(size)
    for link, count in zip(links, positions, strict=True):
        if link.terms:
            terms = gamma(link.terms + 1)
            kappa = 2 * (terms + _ROUNDOFF * (1 + terms))  # twice: room for the rounding of this bound
            bias_norm = link.bias_norm * math.sqrt(count) * (1 + 4 * _ROUNDOFF)
            fresh = kappa * (link.absolute_norm * (size + error) + bias_norm) + 2.0**-1000
            error = (link.norm * error + fresh) * (1 + 8 * _ROUNDOFF)
            size = (link.norm * size + bias_norm) * (1 + 8 * _ROUNDOFF)
    return error


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must hold integer classes, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:1])}, got {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise ValueError(f"labels must lie in 0 … {logits.shape[1] - 1}, got {int(labels.min())} … {int(labels.max())}")
    return labels.detach().to(device="cpu", dtype=torch.int64)
