"""Identity maps with one factor for what goes forward and another for what comes back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def times(tensor: Tensor, factor: Tensor) -> Tensor:
    """``tensor * factor`` for a float32 ``factor``, in the type of ``tensor``, without overflow on the way."""
    if tensor.dtype.itemsize < 4:
        return (tensor.float() * factor).to(tensor.dtype)
    return tensor * factor.to(tensor.dtype)


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return times(tensor, forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, backward = ctx.saved_tensors
        return times(gradient, backward), None, None


class _GateForwardMode(_Gate):
    """With the derivative that forward mode asks for; compilers refuse functions that define one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        forward, _backward = ctx.saved_tensors
        return times(tangent, forward)


def gate(tensor: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """``forward * tensor`` whose gradient is multiplied by ``backward`` instead."""
    function = _Gate if torch.compiler.is_compiling() else _GateForwardMode
    result: Tensor = function.apply(tensor, forward, backward)
    return result


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.then = backward
        return times(tensor, torch.tensor(factor, device=tensor.device))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.then(gradient), None, None


def probe(tensor: Tensor, factor: float, backward: Callable[[Tensor], Tensor]) -> Tensor:
    """``factor * tensor``; ``backward`` sees the gradient and says what to send on."""
    result: Tensor = _Probe.apply(tensor, factor, backward)
    return result
