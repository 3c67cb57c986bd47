"""Measure the scales of wrapped modules: activations in a forward pass, gradients in its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import exp, inf, log
from typing import Any

import torch
from torch import Tensor, nn

from orthogonium._checks import check_count
from orthogonium._randomness import own_randomness
from orthogonium.initialization.empirical._gates import gate, probe
from orthogonium.initialization.empirical._progress import Progress
from orthogonium.initialization.empirical._record import Record
from orthogonium.initialization.empirical._redraw import redraw_weights
from orthogonium.initialization.empirical._trees import arguments_of, detached, map_signals, rms, signals
from orthogonium.initialization.empirical._updates import Call, kept, random_state
from orthogonium.initialization.empirical.normed import Normed, is_scaled
from orthogonium.initialization.empirical.report import ScaleReport

_PASSES = 4  # at most, where modules are reused
_CHAOTIC = 1e4  # growth of the true gradient beyond which factors measured on one batch do not fit the next


def empirical_init(
    wrappers: Sequence[Normed],
    forward: Callable[..., Any],
    get_input: Callable[[int], Any],
    get_loss: Callable[[Any], Tensor],
    batchsz: int = 64,
    test_lr: float = 1e-5,
    verbose: bool = False,
    *,
    redraw: bool = False,
    generator: torch.Generator | None = None,
) -> ScaleReport:
    """Measure the scales that give every wrapped module activations, gradients and updates of root mean square one.

    One run of the model, forward and backward, does it at any depth: each module's outputs are scaled before the next
    one sees them, and each gradient before it travels on. Then every module is run once more with its weights moved by
    a small step. Modules that are called several times share one scale between calls, which takes up to four runs.

    Weights, buffers, gradients in ``.grad`` and modes are left as they are; only the scales of the wrappers change.
    What one constant cannot do is said in ``report.notes``. Inputs and outputs of all wrapped modules are held in
    memory, about as much as the backward pass holds already.

    Args:
        wrappers: the modules to tune, see :func:`get_wrapped_submodules`.
        forward: the model, or any function that runs it.
        get_input: batch size to an input for ``forward``; a tuple is passed as several arguments, a dict by keyword.
        get_loss: what ``forward`` returned to a scalar, for example the training loss with random labels.
        batchsz: passed to ``get_input``.
        test_lr: step by which updates are measured, moved into the range where neither rounding nor curvature spoils
            the difference.
        verbose: print the report.
        redraw: draw the weights anew first: matrices and kernels Gaussian with variance one over the fan-in, biases
            zero; normalisation layers and frozen parameters stay.
        generator: makes random numbers in here depend on it alone, and leaves the global random state as it was.

    Returns:
        the scales, and the sizes that they lead to on the batch that was used.

    Raises:
        TypeError: ``wrappers`` holds something else than :class:`Normed`, or the loss is no tensor.
        ValueError: no wrappers, a loss that is not one number or does not depend on them, or a wrong number.

    Source:
        Mishkin and Matas, "All you need is a good init", ICLR 2016, for activations; Yang and Hu, "Tensor programs IV:
        feature learning in infinite-width neural networks", ICML 2021, for the three sizes.
    """
    found = _check(wrappers, batchsz, test_lr)
    start = time.process_time()
    with _randomness_of(generator), _buffers_kept(found, forward):
        if redraw:
            redraw_weights([wrapper.module for wrapper in found])
        records = {wrapper: Record(wrapper.module) for wrapper in found}
        with Progress("empirical_init", 3 * len(found)) as progress:
            passes, settled = 0, False
            while not settled and passes < _PASSES:
                passes += 1
                gradients = _run(records, forward, get_input, get_loss, batchsz, progress)
                good = [record.settle() for record in records.values()]
                settled = all(good)
            for record in records.values():
                record.measure_update(gradients, test_lr)
                progress.advance()
    for wrapper, record in records.items():
        wrapper.set_scales(record.activation, record.gradient, record.update)
    report = _report(records, forward, passes, time.process_time() - start)
    if verbose:
        print(report)
    return report


def measure_scales(
    wrappers: Sequence[Normed],
    forward: Callable[..., Any],
    get_input: Callable[[int], Any],
    get_loss: Callable[[Any], Tensor],
    batchsz: int = 64,
    test_lr: float = 1e-5,
    *,
    generator: torch.Generator | None = None,
) -> ScaleReport:
    """Root mean squares of activations, gradients and updates with the scales as they are, on one fresh batch.

    One run of the model; nothing is changed. Arguments, checks and result are those of :func:`empirical_init`.
    """
    found = _check(wrappers, batchsz, test_lr)
    start = time.process_time()
    with _randomness_of(generator), _buffers_kept(found, forward):
        records = {wrapper: Record(wrapper.module, wrapper) for wrapper in found}
        with Progress("measure_scales", 3 * len(found)) as progress:
            gradients = _run(records, forward, get_input, get_loss, batchsz, progress)
        for record in records.values():
            record.measure_update(gradients, test_lr)
    return _report(records, forward, 1, time.process_time() - start)


def _check(wrappers: Sequence[Normed], batchsz: int, test_lr: float) -> list[Normed]:
    found = list(dict.fromkeys(wrappers))
    for wrapper in found:
        if not isinstance(wrapper, Normed):
            raise TypeError(
                f"wrappers must hold Normed modules, got {type(wrapper).__name__}. "
                "Wrap a model with wrap_all_leaf_modules and collect them with get_wrapped_submodules(model)."
            )
    if not found:
        raise ValueError("wrappers is empty. Wrap the model first, for example with wrap_all_leaf_modules(model)")
    check_count("batchsz", batchsz)
    if batchsz < 1:
        raise ValueError(f"batchsz must be at least 1, got {batchsz}")
    if not 0 < test_lr < inf:
        raise ValueError(f"test_lr must be finite and above 0, got {test_lr}")
    return found


def _run(
    records: dict[Normed, Record],
    forward: Callable[..., Any],
    get_input: Callable[[int], Any],
    get_loss: Callable[[Any], Tensor],
    batchsz: int,
    progress: Progress,
) -> dict[nn.Parameter, Tensor]:
    """One run with every wrapper observed; gradients of their trainable parameters."""
    calls = 0

    def observe(wrapper: Normed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        record = records[wrapper]
        if not record.calls:
            record.order = calls
            progress.advance()
        calls += 1
        state = random_state(wrapper.update_scale.device)
        still_args, still_kwargs = detached((args, kwargs))
        attenuation = record.attenuation(args, kwargs)
        one = torch.ones_like(wrapper.update_scale)

        def into(_: int, tensor: Tensor) -> Tensor:
            return gate(tensor, one, one / attenuation) if tensor.requires_grad else tensor

        args, kwargs = map_signals(into, (args, kwargs))
        result = wrapper.module(*args, **kwargs)
        raw = [out.detach().clone() for out in signals(result)]
        call = record.begin(Call(still_args, still_kwargs, raw, state))

        def out_of(number: int, tensor: Tensor) -> Tensor:
            factor = record.see_activation(call, number, rms(tensor)) if is_scaled(wrapper.module, number) else 1.0

            def backward(gradient: Tensor) -> Tensor:
                if not record.gradients_of(call):
                    progress.advance()
                back = record.see_gradient(call, number, rms(gradient)) if is_scaled(wrapper.module, number) else 1.0
                wide = gradient.float() if gradient.dtype.itemsize < 4 else gradient
                return (wide * (back * attenuation)).to(gradient.dtype)

            return probe(tensor, factor, backward)

        return map_signals(out_of, result)

    parameters = list(dict.fromkeys(p for wrapper in records for p in wrapper.module.parameters() if p.requires_grad))
    for record in records.values():
        record.forget()
    with torch.enable_grad(), _observed(records, observe):
        given_args, given_kwargs = arguments_of(get_input(batchsz))
        output = forward(*given_args, **given_kwargs)
        loss = get_loss(output)
        _check_loss(loss, bool(parameters))
        if not parameters:
            return {}
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {p: gradient for p, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _check_loss(loss: Any, trains: bool) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"get_loss must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"get_loss must return one number, got shape {tuple(loss.shape)}. Take its mean")
    if trains and not loss.requires_grad:
        raise ValueError("the loss does not depend on any trainable parameter of the wrapped modules")


@contextmanager
def _observed(records: dict[Normed, Record], observe: Callable[..., Any]) -> Iterator[None]:
    for wrapper in records:
        wrapper._observer = observe
    try:
        yield
    finally:
        for wrapper in records:
            wrapper._observer = None


def _randomness_of(generator: torch.Generator | None) -> AbstractContextManager[None]:
    if generator is None:
        return nullcontext()
    return own_randomness(int(torch.randint(2**62, (), generator=generator, device=generator.device)))


@contextmanager
def _buffers_kept(wrappers: list[Normed], forward: Any) -> Iterator[None]:
    """Running statistics must not average what flowed before the scales were there."""
    roots = [*wrappers, *([forward] if isinstance(forward, nn.Module) else [])]
    buffers = {id(b): b for root in roots for b in root.buffers()}
    with kept(list(buffers.values())):
        yield


def _report(records: dict[Normed, Record], forward: Any, passes: int, seconds: float) -> ScaleReport:
    names = {module: name for name, module in forward.named_modules()} if isinstance(forward, nn.Module) else {}
    ordered = sorted(records.items(), key=lambda item: item[1].order)
    rows = tuple(record.row(names.get(wrapper, "")) for wrapper, record in ordered)
    return ScaleReport(rows, passes, seconds, tuple(_notes([record for _, record in ordered])))


def _notes(ordered: list[Record]) -> list[str]:
    chain = [record for record in ordered if record.calls and record.is_measured()]
    growth = [log(record.activation[0] / record.gradient[0]) for record in chain[:-1]]
    total = sum(growth)
    if total <= log(_CHAOTIC):
        return []
    return [
        f"Activations of this size make the network chaotic: its true gradient grows by {exp(total / len(growth)):.3f} "
        f"per module, {exp(min(total, 700)):.1e} in all. Such a gradient depends on every detail of the input, so that "
        "constant gradient scales fit this batch only. Start from orthogonal weights with the critical gain, "
        "orthogonium.gain(activation, criterion='critical'), or add residual connections."
    ]
