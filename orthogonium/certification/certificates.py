"""Predictions that cannot change within a radius, rounding included."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from orthogonium.certification.faithful import check_same_results
from orthogonium.certification.forward_error import SizeRecorder, check_rounding, forward_error
from orthogonium.certification.network import Network, analyse
from orthogonium.certification.operators import row_distances
from orthogonium.certification.program import run
from orthogonium.certification.rounding import BINARY64, Arithmetic
from orthogonium.certification.rules.registry import UNCHANGED
from orthogonium.certification.tracing import named
from orthogonium.linalg._rounding import UP

_ROUNDOFF = 2.0**-53
_DOWN = 1 - 2.0**-48
_SMALLEST = 2.0**-1000
_FARTHEST = 2.0**20  # times the size of the input: farther out, rounding alone could decide
_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)


@dataclass(frozen=True)
class Certificate:
    """What is proved about each input, for the network evaluated in the precision that was asked for.

    Attributes:
        prediction: ``(N,)``, the class of the largest logit; of a single logit, whether it is positive.
        radius: ``(N,)``, float64. Every input at ℓ2 distance at most ``radius`` has the same prediction. Zero: nothing
            is proved.
        margin: ``(N,)``, the logit of the class in question less the largest other one; of a single logit z, ``z`` or
            ``−z``.
        lipschitz: an upper bound on the constant of the network.
        error: ``(N,)``, an upper bound on ``‖computed − exact‖`` of the logits, at the input and inside the radius.
    """

    prediction: Tensor
    radius: Tensor
    margin: Tensor
    lipschitz: float
    error: Tensor

    def holds(self, radius: float = 0.0) -> Tensor:
        """``(N,)``, boolean: whether the prediction is proved not to change within ``radius``."""
        return (self.radius >= radius) & (self.radius > 0)


def certify(
    model: nn.Module, x: Tensor, labels: Tensor | None = None, *, precision: torch.dtype = torch.float64
) -> Certificate:
    """Prove, for each input, a radius within which the prediction cannot change.

    A change of the input by δ changes the difference of two logits by at most ``ℓ_ij ‖δ‖``, so class i stays on top
    while, for every j, ``‖δ‖ < (z_i − z_j) / ℓ_ij``. If the last layer is linear, ``ℓ_ij = ‖w_i − w_j‖ L`` after
    features of constant ``L``; if the logits are joined from parts, it is the sum of the constants of two parts;
    otherwise √2 times the constant of the network. A single logit is a binary classifier: its sign is the prediction,
    and ``|z| / L`` the radius. This holds everywhere in the input space, not only for valid images.

    Computed logits differ from exact ones by at most an error D that is carried through the network, both here and at
    the attacked input. For two logits each, that is taken off the margin first; the quotient is rounded down.

    The statement is about the network with the weights as the model computes them, evaluated in ``precision`` in any
    order of summation, elementary functions within 4 units in the last place. Inputs are certified as they are given:
    scaling them beforehand scales the radius, so put a normalisation into the model.

    Args:
        model: in evaluation mode, maps ``(N, ...)`` to ``(N, classes)``, or to ``(N, 1)`` or ``(N,)`` for two classes;
            of what :func:`~orthogonium.lipschitz_bound` knows.
        x: ``(N, ...)``, floating-point.
        labels: ``(N,)``, integer classes. With them, ``margin`` is that of the label, negative where the
            prediction is wrong, and ``radius`` is zero there.
        precision: of the evaluation that keeps its class: ``torch.float64``, or ``torch.float32`` for smaller radii
            about a deployed network (for float32 inputs, and weights that float32 holds).

    Returns:
        A :class:`Certificate`. Ties, NaN and infinities have radius zero.

    Raises:
        TypeError: ``x`` is not floating-point, ``labels`` not integer, a module is not known, or its rounding is not.
        ValueError: the model is in training mode, gives no logits, shapes do not match, or the precision is another.

    Source:
        Tsuzuku, Sato and Sugiyama, "Lipschitz-margin training", NeurIPS 2018, for margins; Higham,
        "Accuracy and Stability of Numerical Algorithms", 2002, section 3.5, for D.
    """
    arithmetic = Arithmetic.of(precision)
    _check_input(x)
    return _certify(_network(model, x, arithmetic), x, labels, arithmetic)


def certified_accuracy(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    eps: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    *,
    precision: torch.dtype = torch.float64,
    progress: bool = False,
) -> dict[float, float]:
    """The share of inputs that are classified correctly and certified at each radius.

    Args:
        model: as in :func:`certify`. It is traced and bounded once for all batches of one image size.
        data: ``(x, labels)``, or an iterable of such pairs, for example a DataLoader, read one by one.
        eps: ℓ2 radii, not negative; at 0 the result is the clean accuracy.
        precision: as in :func:`certify`.
        progress: show a bar while reading, if the package ``rich`` is installed.

    Returns:
        ``{radius: fraction}`` in the order of ``eps``.

    Raises:
        TypeError: ``eps`` is not a sequence of numbers, or ``data`` holds anything but pairs.
        ValueError: a radius is negative or NaN, or there are no data; and all errors of :func:`certify`.
    """
    radii = _checked_radii(eps)
    arithmetic = Arithmetic.of(precision)
    pairs: Any = [data] if isinstance(data, tuple | list) and any(isinstance(d, Tensor) for d in data) else data
    counts, total = dict.fromkeys(radii, 0), 0
    networks: dict[tuple[int, ...], Network] = {}
    for pair in _with_progress(pairs, progress):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            kind = f"{len(pair)} values" if isinstance(pair, tuple | list) else type(pair).__name__
            raise TypeError(f"data must hold pairs (x, labels), got {kind}. Pick the two, e.g. in a generator")
        x, labels = pair
        _check_input(x)
        if x.shape[1:] not in networks:
            networks[x.shape[1:]] = _network(model, x, arithmetic)
        certificate = _certify(networks[x.shape[1:]], x, labels, arithmetic)
        correct = certificate.prediction == labels.to(certificate.prediction.device)
        for radius in radii:
            counts[radius] += int((correct & (certificate.radius >= radius)).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("data holds no inputs, so there is no accuracy")
    return {radius: counts[radius] / total for radius in radii}


def _checked_radii(eps: Sequence[float]) -> list[float]:
    try:
        radii = [float(radius) for radius in eps]
    except (TypeError, ValueError):
        raise TypeError(f"eps must be a sequence of radii such as (0.1, 0.5), got {eps!r}") from None
    for radius in radii:
        if not radius >= 0:
            raise ValueError(f"eps must hold radii of at least 0, got {radius}")
    return radii


def _with_progress(pairs: Any, progress: bool) -> Iterable[tuple[Tensor, Tensor]]:
    if not progress:
        return pairs
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        return pairs
    return track(pairs, description="Certifying", total=len(pairs) if hasattr(pairs, "__len__") else None)


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}. Convert it, e.g. with torch.as_tensor")
    if x.is_meta:
        raise ValueError("x is on the meta device, without values")
    if not x.is_floating_point():
        raise TypeError(f"x must be a real floating-point tensor, got {x.dtype}. Convert it, e.g. with x.float()")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, ...), got {tuple(x.shape)}. For one input use x[None]")


def _network(model: nn.Module, x: Tensor, arithmetic: Arithmetic) -> Network:
    network = analyse(model, x.shape[1:])
    check_same_results(model, network, x.shape[1:])
    check_rounding(network)
    if arithmetic is not BINARY64 and arithmetic.dtype != torch.float64:
        for name, value in network.program.named_buffers():
            if value.is_floating_point() and not torch.equal(value, value.to(arithmetic.dtype).double()):
                raise ValueError(
                    f"precision={arithmetic.dtype} needs weights that it holds exactly, and {name} of the traced "
                    f"network is not: converting it would make another network. Certify model.float()"
                )
    return network


def _certify(network: Network, x: Tensor, labels: Tensor | None, arithmetic: Arithmetic) -> Certificate:
    assert network.output is not None
    x = x.detach().as_subclass(Tensor).to(device="cpu", dtype=torch.float64)
    recorder = SizeRecorder(network)
    found: dict[fx.Node, Tensor] = {}

    def visit(node: fx.Node, value: Any) -> None:
        step = network.steps.get(node)
        if step is not None and step.shape is not None and value.shape != (len(x), *step.shape):
            raise ValueError(
                f"{named(step.path)} ({step.kind}) gives {tuple(value.shape)} for {len(x)} inputs, and "
                f"{('N', *step.shape)} otherwise. Use squeeze(dim), or another batch size"
            )
        recorder(node, value)
        if node is network.output:
            assert isinstance(value, Tensor)
            found[node] = value

    run(network.program, x, visit=visit)
    logits = found[network.output]
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
        gaps, prediction, subject = _binary(logits.reshape(len(x)), labels)
        reach = torch.full_like(gaps, network.bound)
        logits_in_play = 1
    elif logits.ndim == 2 and logits.shape[1] > 1:
        prediction = logits.argmax(1)
        subject = prediction if labels is None else _checked_labels(labels, logits.shape[1], len(x))
        is_subject = torch.nn.functional.one_hot(subject, logits.shape[1]).bool()
        most = torch.finfo(logits.dtype).max  # a difference may overflow
        gaps = (logits.gather(1, subject[:, None]) - logits).clamp_max(most).masked_fill(is_subject, math.inf)
        reach = _reach(network, logits.shape[1])[subject] * UP
        logits_in_play = 2
    else:
        raise ValueError(f"the model must give (N, classes), (N, 1) or (N,), got {tuple(logits.shape)}")
    margin = gaps.amin(1)
    (start,) = (node for node in network.steps if node.op == "placeholder")
    # The error at an attacked input is bounded through its distance, at most the radius without rounding.
    exact = _radius(gaps, reach, torch.zeros_like(margin)).clamp_max(_FARTHEST * (1 + recorder.sizes[start]))
    errors = forward_error(network, recorder.sizes, exact, BINARY64)
    here = there = errors[network.output]
    if arithmetic.dtype != torch.float64:
        there = forward_error(network, recorder.sizes, exact, arithmetic, errors)[network.output]
    radius = torch.minimum(exact, _radius(gaps, reach, logits_in_play * (here + there) * UP))
    certain = torch.isfinite(logits).flatten(1).all(1) if logits.ndim > 1 else torch.isfinite(logits)
    radius = torch.where(certain & torch.isfinite(there) & (prediction == subject), radius, 0.0)
    return Certificate(prediction, radius, margin, network.bound, there)


def _binary(logit: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    prediction = (logit > 0).long()
    subject = prediction if labels is None else _checked_labels(labels, 2, len(logit))
    return torch.where(subject == 1, logit, -logit)[:, None], prediction, subject


def _radius(gaps: Tensor, reach: Tensor, error: Tensor) -> Tensor:
    """``min over j of (gap − error) / reach``, rounded down: ``(N,)``, never negative."""
    room = (gaps - gaps.abs() * _ROUNDOFF * 2 - error[:, None]) * _DOWN
    radius = torch.where(reach > 0, room / reach, torch.where(room > 0, math.inf, 0.0))
    radius = torch.where(gaps == math.inf, math.inf, radius).amin(1) * _DOWN
    return torch.where(radius > _SMALLEST, radius, 0.0)  # below it nothing is rounded down; NaN is not above


def _reach(network: Network, classes: int) -> Tensor:
    """How fast the difference of two logits can change, at most: ``(classes, classes)``."""
    assert network.output is not None
    step = network.steps[network.output]
    reach = torch.full((classes, classes), math.sqrt(2) * (1 + 4 * _ROUNDOFF) * network.bound, dtype=torch.float64)
    while step.response is UNCHANGED and step.shape == (classes,):
        step = network.steps[step.inputs[0]]
    inputs = [network.steps[node] for node in step.inputs]
    if step.response.matrix is not None and step.shape == (classes,):
        reach = torch.minimum(reach, row_distances(step.response.matrix) * inputs[0].bound * UP)
    elif step.response.stacked and step.node.target in _JOINS:
        counts = [1 if part.shape == () else part.shape[0] if part.shape else 0 for part in inputs]
        if sum(counts) == classes:
            bounds = [
                torch.full((count,), part.bound, dtype=torch.float64)
                for count, part in zip(counts, inputs, strict=True)
            ]
            own = torch.cat(bounds)
            part = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            same = part[:, None] == part
            sums = torch.where(same, math.sqrt(2) * own[:, None], own[:, None] + own) * UP
            reach = torch.minimum(reach, sums)
    return reach


def _checked_labels(labels: Tensor, classes: int, count: int) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor of integer classes, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must hold integer classes, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"labels must have shape {(count,)}, got {tuple(labels.shape)}")
    if count and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(f"labels must lie in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")
    return labels.detach().to(device="cpu", dtype=torch.int64)
