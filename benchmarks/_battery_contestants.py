"""The layers that go through the battery, behind one interface, and what each of them promises."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

NAMES = ["ours", "torch orthogonal", "torch spectral_norm", "geotorch", "torchlip", "peer"]


class Refused(Exception):
    """What a check found wrong."""


@dataclass(frozen=True)
class Contestant:
    """``wrap`` constrains a plain layer that holds a weight; ``again`` is applied to a constrained layer."""

    name: str
    wrap: Callable[[nn.Linear], nn.Module]
    again: Callable[[Any], object]
    orthogonal: bool = True  # or a largest singular value of one
    exported: Callable[[Any], nn.Module] = lambda layer: layer  # the way to a plain module that its documentation names
    documents_state: bool = False  # says that a forward pass in training mode moves a buffer
    make: Callable[..., Any] | None = None

    def layer(self, n: int = 8, out: int | None = None, seed: int = 0, **kwargs: Any) -> Any:
        """A fresh layer in training mode."""
        torch.manual_seed(seed)
        if self.make is not None:
            return self.make(n, n if out is None else out, **kwargs)
        return self.wrap(nn.Linear(n, n if out is None else out, **kwargs))

    def wrapped(self, weight: Tensor) -> Any:
        """The constraint put on a plain layer that holds ``weight``."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
        return self.wrap(linear)

    def check(self, layer: Any, what: str = "weight") -> None:
        """Raise unless the weight and a gradient through it are finite, and the promise holds to the tolerance."""
        weight = layer.weight
        if not weight.isfinite().all():
            raise Refused(f"{what}: NaN or Inf, without a word")
        free = free_of(layer)
        if weight.requires_grad and weight.numel():
            given = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape).to(weight.dtype)
            (gradient,) = torch.autograd.grad(weight, free, given, allow_unused=True)
            if gradient is not None and not gradient.isfinite().all():
                raise Refused(f"{what}: gradient with NaN or Inf")
        miss = self.miss(weight)
        if not miss <= tolerance(weight.dtype):
            raise Refused(f"{what}: off by {miss:.0e}")

    def miss(self, weight: Tensor) -> float:
        """How far the singular values are from what is promised."""
        if not weight.numel():
            return 0.0
        values = torch.linalg.svdvals(weight.detach().double())
        return float((values - 1).abs().max() if self.orthogonal else (values.max() - 1).clamp_min(0))


def tolerance(dtype: torch.dtype) -> float:
    """1e-3 in float32 and float64, which allows an iteration its stopping rule; 4 units in the last place in half."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def free_of(layer: Any) -> Tensor:
    """The tensor that the optimiser sees."""
    free: Tensor = layer.parametrizations.weight.original
    return free


def clear(error: Exception) -> bool:
    """Whether a caller can act on the error: a value, type or run-time error in words, no accident inside."""
    internal = (AssertionError, AttributeError, IndexError, KeyError, ZeroDivisionError, UnboundLocalError)
    return not isinstance(error, (Refused, TimeoutError, *internal)) and len(str(error)) >= 20


def contestant(name: str, preset: str) -> Contestant:
    """The contestant of that name; libraries are imported here, in the process that runs the checks."""
    if name == "ours":
        return _ours(preset)
    if name == "peer":
        return _peer()
    if name == "geotorch":
        import geotorch

        return Contestant(name, _in_place(lambda linear: geotorch.orthogonal(linear, "weight")), geotorch_again)
    if name == "torchlip":
        return _torchlip()
    if name == "torch orthogonal":
        put = _in_place(torch.nn.utils.parametrizations.orthogonal)
        return Contestant(name, put, put)
    if name == "torch spectral_norm":
        put = _in_place(torch.nn.utils.parametrizations.spectral_norm)
        return Contestant(name, put, put, orthogonal=False, documents_state=True)
    raise ValueError(f"unknown contestant {name!r}; known: {', '.join(NAMES)}")


def _in_place(put: Callable[[Any], object]) -> Callable[[Any], Any]:
    def wrap(linear: Any) -> Any:
        put(linear)
        return linear

    return wrap


def geotorch_again(layer: Any) -> None:
    import geotorch

    geotorch.orthogonal(layer, "weight")


def _ours(preset: str) -> Contestant:
    import orthogonium as og

    params = og.PRESETS[preset]

    def put(linear: nn.Linear) -> nn.Module:
        return og.orthogonal(linear, ortho_params=params)

    def make(n: int, out: int, **kwargs: Any) -> nn.Module:
        return og.OrthoLinear(n, out, ortho_params=params, **kwargs)

    return Contestant("ours", put, put, exported=og.export, make=make)


def _class_only(make: Callable[[int, int], Any]) -> tuple[Callable[[nn.Linear], Any], Callable[..., Any]]:
    """For a layer class without a function that constrains a given layer: build it, then fill its free tensor."""

    def built(n: int, out: int, *, device: Any = None, dtype: Any = None) -> Any:
        layer = make(n, out)
        return layer.to_empty(device=device) if str(device) == "meta" else layer.to(device=device, dtype=dtype)

    def wrap(linear: nn.Linear) -> Any:
        layer = built(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
        with torch.no_grad():
            free_of(layer).copy_(linear.weight)
            layer.bias.copy_(linear.bias)
        free_of(layer).requires_grad_(linear.weight.requires_grad)
        return layer

    return wrap, built


def _torchlip() -> Contestant:
    from deel import torchlip
    from deel.torchlip.utils import bjorck_norm

    wrap, make = _class_only(torchlip.SpectralLinear)

    def again(layer: Any) -> None:
        torch.nn.utils.parametrizations.spectral_norm(layer, name="weight")
        bjorck_norm(layer, name="weight")

    return Contestant(
        "torchlip", wrap, again, exported=lambda layer: layer.vanilla_export(), documents_state=True, make=make
    )


def _peer() -> Contestant:
    from orthogonium.layers.linear.ortho_linear import OrthoLinear

    from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS

    wrap, make = _class_only(OrthoLinear)

    def again(layer: Any) -> None:
        shape = (layer.out_features, layer.in_features)
        parametrize.register_parametrization(
            layer, "weight", DEFAULT_ORTHO_PARAMS.spectral_normalizer(weight_shape=shape)
        )
        parametrize.register_parametrization(layer, "weight", DEFAULT_ORTHO_PARAMS.orthogonalizer(weight_shape=shape))

    return Contestant("peer", wrap, again, make=make)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Entries of variance one over the longer side."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draw / math.sqrt(max(1, *shape))).to(dtype)
