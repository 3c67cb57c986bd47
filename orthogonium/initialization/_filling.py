"""Draws of one kind into weights of layers, with the factor that a change of width asks for."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import init

from orthogonium.initialization.kernels import conv_orthogonal_, delta_orthogonal_
from orthogonium.initialization.mirrored import looks_linear_
from orthogonium.linalg._precision import working_dtype
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS, Convolution, check_kernel

KINDS = ("orthogonal", "delta_orthogonal", "gaussian", "looks_linear")


@dataclass(frozen=True)
class Draw:
    """How to draw: the kind, and where random numbers come from.

    An orthogonal map to more features keeps the norm of the signal and so shrinks each entry; ``growth``, the root of
    that ratio, makes up for it. Entries then keep their size going forward, and gradients their norm coming back.
    """

    kind: str
    generator: torch.Generator | None

    def check(self, module: nn.Linear | Convolution, position: str) -> None:
        """Raise ``ValueError`` where this kind cannot fill the weight of the layer."""
        if self.kind != "looks_linear":
            return
        if isinstance(module, CONVOLUTIONS) and (module.groups > 1 or module.transposed):
            raise ValueError("looks-linear kernels mix all channels of a convolution: groups or transposed ones not")
        looks_linear_(torch.empty(module.weight.shape, device="meta"), position)

    def matrix(self, weight: Tensor, gain: float, position: str = "hidden") -> float:
        """Fill ``(out, in)`` in place; returns the largest singular value, or its scale for Gaussian draws."""
        if self.kind == "gaussian":
            self._gaussian(weight, gain / math.sqrt(weight.shape[1]))
            return gain
        scale = gain * growth(weight.shape[0], weight.shape[1])
        if self.kind == "looks_linear":
            scale = gain * growth(*_halves(weight.shape, position))
            self._fill(weight, lambda t: looks_linear_(t, position, scale, self.generator))
        else:
            self._fill(weight, lambda t: init.orthogonal_(t, scale, self.generator))
        return scale

    def kernel(self, module: Convolution, weight: Tensor, gain: float, position: str = "hidden") -> tuple[float, str]:
        """Fill a convolution's kernel in place; returns the scale and what kind of kernel it became."""
        stride = math.prod(module.stride)
        ins, outs = module.in_channels, module.out_channels
        if self.kind == "gaussian":
            fan = ins // module.groups * math.prod(module.kernel_size) / (stride if module.transposed else 1)
            self._gaussian(weight, gain / math.sqrt(fan))
            return gain, "gaussian"
        if self.kind == "looks_linear":
            scale = gain * growth(*_halves(weight.shape, position))
            self._fill(weight, lambda t: looks_linear_(t, position, scale, self.generator))
            return scale, "looks linear, delta"
        tiles = self.kind == "orthogonal" or (module.transposed and stride > 1)
        if tiles and _kernel_exists(module):
            scale = gain * (growth(outs * stride, ins) if module.transposed else growth(outs, ins * stride))
            self._fill(weight, lambda t: conv_orthogonal_(t, module.stride, module.groups, scale, self.generator))
            return scale, "orthogonal kernel"
        scale = gain * growth(outs, ins)
        self._fill(weight, lambda t: delta_orthogonal_(t, module.groups, scale, self.generator))
        return scale, "delta-orthogonal kernel"

    def normal(self, tensor: Tensor, std: float) -> None:
        """Fill with a Gaussian of that standard deviation; zeros for 0."""
        if std > 0:
            self._gaussian(tensor, std)
        else:
            tensor.detach().zero_()

    def uniform(self, tensor: Tensor, lower: float, upper: float) -> None:
        self._fill(tensor, lambda t: t.uniform_(lower, upper, generator=self.generator))

    def _gaussian(self, tensor: Tensor, std: float) -> None:
        self._fill(tensor, lambda t: t.normal_(0.0, std, generator=self.generator))

    def _fill(self, tensor: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        """Drawn where the generator lives, in float32 at least, then copied."""
        device = tensor.device if self.generator is None else self.generator.device
        work = working_dtype(tensor.dtype)
        with torch.no_grad():
            tensor.copy_(fill(torch.empty(tensor.shape, device=device, dtype=work)))


def growth(outs: int, ins: int) -> float:
    """``√(outs / ins)`` where outputs are more, else one."""
    return math.sqrt(max(1.0, outs / ins))


def _halves(shape: torch.Size, position: str) -> tuple[int, int]:
    return shape[0] // (1 if position == "last" else 2), shape[1] // (1 if position == "first" else 2)


def _kernel_exists(module: Convolution) -> bool:
    try:
        check_kernel(module)
    except ValueError:
        return False
    return True
