"""Watching every layer of a model in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from orthogonium._randomness import own_randomness
from orthogonium.initialization.empirical._trees import arguments_of, detached, is_signal, map_signals, rms, signals
from orthogonium.initialization.empirical._updates import kept
from orthogonium.initialization.empirical.normed import Normed, is_leaf

_PLUMBING = (nn.Identity, nn.Flatten, nn.Unflatten)
# the steepest slope of activations that level off
_PEAK_SLOPES: dict[type[nn.Module], float] = {
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.Hardtanh: 1.0,
    nn.Hardsigmoid: 1 / 6,
    nn.Softsign: 1.0,
}
_FLAT = 0.1  # of the steepest slope
_ENTRIES = 1 << 16  # looked at for slopes


@dataclass
class Observed:
    """One call of one layer."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input_spread: float | None = None
    input_dead: float | None = None
    activation_rms: float = 0.0
    activation_mean: float = 0.0
    output_spread: float | None = None
    dead: float = 0.0
    saturated: float | None = None
    correlation: float | None = None
    gradient_rms: float | None = None
    gradient_mean: float | None = None


@dataclass
class Run:
    """All calls in order, gradients by parameter, and the output."""

    calls: list[Observed] = field(default_factory=list)
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    output: Any = None
    batch_size: int = 0


def random_direction(output: Any) -> Tensor:
    """A loss for those who gave none: outputs times fixed Gaussian numbers, over the root of their count per input."""
    generator = torch.Generator().manual_seed(0)
    total: Any = 0.0
    for tensor in signals(output):
        draw = torch.randn(tensor.shape, generator=generator).to(tensor)
        total = total + (tensor * draw).sum() / (tensor.numel() * max(tensor.shape[0] if tensor.ndim else 1, 1)) ** 0.5
    if not isinstance(total, Tensor):
        raise ValueError("the model returned no floating-point tensor, so there is no signal to follow")
    return total


def check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must take the model's output to one number, got {what}. Bind targets with a lambda")


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers and activations, once each: what has parameters of its own, or no parts at all."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        parts = [child for child_name, child in module.named_children() if child_name != "parametrizations"]
        if isinstance(module, Normed) or is_leaf(module) or not parts:
            inside |= {id(part) for part in module.modules()}
            if not isinstance(module, _PLUMBING):
                yield name, module


def observe(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None, keep: str = "all") -> Run:
    """Run ``model`` forward and backward once; weights, ``.grad``, buffers and the random state stay as they are.

    ``keep`` says which inputs of layers stay in memory: ``"all"``, those of the ``"first"`` input of the batch, or
    ``"none"``.
    """
    args, kwargs = arguments_of(batch)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not leaves or not leaves[0].ndim:
        raise ValueError("batch must hold a tensor whose first axis counts inputs")
    run = Run(batch_size=len(leaves[0]))
    with ExitStack() as stack:
        stack.enter_context(kept(list(model.buffers())))
        stack.enter_context(own_randomness())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_watched(model, run, keep))
        args, kwargs = map_signals(lambda _, t: t.detach().clone().requires_grad_() * 1, (args, kwargs))
        run.output = model(*args, **kwargs)
        value = (random_direction if loss is None else loss)(run.output)
        check_loss(value)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if value.requires_grad and parameters:
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            run.gradients = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
    return run


@contextmanager
def _watched(model: nn.Module, run: Run, keep: str) -> Iterator[None]:
    counts: dict[nn.Module, int] = {}
    open_calls: list[Observed] = []
    channels_first = [False]

    def before(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        counts[module] = counts.get(module, 0) + 1
        label = name if counts[module] == 1 else f"{name} (call {counts[module]})"
        call = Observed(label, module, *detached((args, kwargs)))
        found = signals((call.args, call.kwargs))
        if found:
            call.input_spread = spread(found[0], run.batch_size)
            call.input_dead = dead_units(found[0], channels_first[0])
        open_calls.append(call)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = open_calls.pop()
        found = signals(output)
        run.calls.append(call)
        if not found:
            return
        if isinstance(module, nn.modules.conv._ConvNd):
            channels_first[0] = True
        elif any(p.ndim == 2 for p in module.parameters(recurse=False)):
            channels_first[0] = False
        main = found[0]
        values = main.detach()
        call.activation_rms, call.activation_mean = rms(values), float(values.double().mean())
        call.output_spread = spread(values, run.batch_size)
        call.dead = dead_units(values, channels_first[0])
        call.correlation = correlation(values, run.batch_size)
        call.saturated = _saturated(module, call)
        if keep == "none":
            call.args, call.kwargs = (), {}
        elif keep == "first" and not is_coupled(module):
            call.args, call.kwargs = copied(first_input_only((call.args, call.kwargs), run.batch_size))
        if main.requires_grad:

            def backward(gradient: Tensor) -> None:
                call.gradient_rms, call.gradient_mean = rms(gradient), float(gradient.double().mean())

            main.register_hook(backward)

    with ExitStack() as stack:
        for name, module in layers_of(model):

            def pre(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                before(module, args, kwargs, name)

            stack.callback(module.register_forward_pre_hook(pre, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _saturated(module: nn.Module, call: Observed) -> float | None:
    """The share of entries at which an activation that levels off is flat."""
    peak = _PEAK_SLOPES.get(type(module))
    given = signals(call.args)
    if peak is None or not given:
        return None
    x = given[0].reshape(-1)[:_ENTRIES].float().requires_grad_()
    (slopes,) = torch.autograd.grad(module.forward(x.clone()).sum(), x)
    return float((slopes < _FLAT * peak).float().mean())


def batch_axis(tensor: Tensor, batch_size: int) -> int | None:
    """Along which axis the inputs of the batch stand: the first, or the second as in recurrent layers."""
    return next((axis for axis in (0, 1) if tensor.ndim > axis and tensor.shape[axis] == batch_size), None)


def _per_input(tensor: Tensor, batch_size: int) -> Tensor | None:
    axis = batch_axis(tensor, batch_size)
    if axis is None or batch_size < 2:
        return None
    return tensor.movedim(axis, 0).reshape(batch_size, -1).double()


def spread(tensor: Tensor, batch_size: int) -> float | None:
    """Root mean square of the difference from the mean input of the batch."""
    rows = _per_input(tensor, batch_size)
    return None if rows is None else float((rows - rows.mean(0)).square().mean().sqrt())


def correlation(tensor: Tensor, batch_size: int) -> float | None:
    """Mean cosine between neighbours in the batch."""
    rows = _per_input(tensor, batch_size)
    if rows is None:
        return None
    norms = rows.norm(dim=1)
    cosines = (rows * rows.roll(1, 0)).sum(1) / (norms * norms.roll(1)).clamp_min(1e-300)
    alive = (norms > 0) & (norms.roll(1) > 0)
    return float(cosines[alive].mean()) if bool(alive.any()) else None


def dead_units(tensor: Tensor, channels_first: bool) -> float:
    """The share of channels (features) that are zero for every input and everywhere."""
    if tensor.ndim == 0:
        return float(tensor == 0)
    axis = 1 if tensor.ndim >= 4 or (tensor.ndim == 3 and channels_first) else -1
    zero = (tensor == 0).movedim(axis, 0).reshape(tensor.shape[axis], -1).all(1)
    return float(zero.float().mean())


def copied(tree: Any) -> Any:
    """``tree`` with tensors that hold on to no larger storage."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def is_coupled(module: nn.Module) -> bool:
    """Whether an output depends on the other inputs of the batch."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(part, kinds) and (part.training or part.running_mean is None) for part in module.modules())


def first_input_only(tree: Any, batch_size: int) -> Any:
    """``tree`` with every tensor cut down to the first input of the batch."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        axis = batch_axis(leaf, batch_size)
        return leaf if axis is None else leaf.narrow(axis, 0, 1)

    return tree_map(cut, tree)


def as_function_of_one_input(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], batch_size: int
) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
    """The map from the first input of the batch to its output, and that input; ``None`` if it holds no real numbers."""
    whole = (tuple(args), dict(kwargs))
    given = whole if is_coupled(module) else first_input_only(whole, batch_size)
    found = signals(given)
    if not found:
        return None
    axis = batch_axis(found[0], batch_size) if is_coupled(module) else None
    point = found[0] if axis is None else found[0].narrow(axis, 0, 1)

    def function(x: Tensor) -> Tensor:
        if axis is not None:
            rest = found[0].narrow(axis, 1, found[0].shape[axis] - 1)
            x = torch.cat([x, rest], axis)
        new_args, new_kwargs = map_signals(lambda number, tensor: x if number == 0 else tensor, given)
        output = next(t for t in tree_leaves(module(*new_args, **new_kwargs)) if is_signal(t))
        out_axis = batch_axis(output, batch_size) if axis is not None else None
        return output if out_axis is None else output.narrow(out_axis, 0, 1)

    return function, point
