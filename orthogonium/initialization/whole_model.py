"""Start a whole model where signals and gradients keep their size."""

import copy
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.initialization._elementwise import NAMED, ActivationLike, as_elementwise
from orthogonium.initialization._filling import KINDS, Draw
from orthogonium.initialization.critical import FixedPoint, critical_point, warn_if_unstable
from orthogonium.initialization.gains import check_depth
from orthogonium.initialization.mirrored import odd_slope
from orthogonium.initialization.recurrent import HORIZON, check_horizon, initialize_recurrent, is_gated, own_activation
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS, RECURRENT, Convolution, weight_names


@dataclass(frozen=True)
class LayerStart:
    """What became of one module: ``method`` in words, ``scale`` of its weight (``None`` where it was kept)."""

    name: str
    module: str
    method: str
    scale: float | None = None


@dataclass
class Initialization:
    """What :func:`initialize` did.

    Attributes:
        sigma_w, sigma_b: gain of the weights and standard deviation of the biases.
        q: variance of pre-activations to which they belong; zero for the limit of vanishing signals, NaN under a gain
            of your own.
        input_scale: root mean square that inputs should have to start at ``q``; 1 where ``q`` is not fixed.
        layers: one :class:`LayerStart` per module that owns parameters, in the order of ``model.modules()``.
    """

    sigma_w: float
    sigma_b: float
    q: float
    input_scale: float
    layers: list[LayerStart] = field(default_factory=list)

    @property
    def kept(self) -> list[str]:
        """Names of modules with parameters that were left alone."""
        return [layer.name for layer in self.layers if layer.scale is None]

    def __str__(self) -> str:
        lines = [f"sigma_w={self.sigma_w:.6g}, sigma_b={self.sigma_b:.6g}, q={self.q:.6g}"]
        for layer in self.layers:
            scale = "" if layer.scale is None else f" × {layer.scale:.6g}"
            lines.append(f"{layer.name or '(model)'}: {layer.module}: {layer.method}{scale}")
        return "\n".join(lines)


def initialize(
    model: nn.Module,
    activation: ActivationLike = "tanh",
    kind: str = "orthogonal",
    gain: float | None = None,
    depth: int | None = None,
    generator: torch.Generator | None = None,
    *,
    horizon: int | None = None,
) -> Initialization:
    """Draw all weights of ``model``, in place, so that neither signals nor gradients die or explode.

    Linear layers become orthogonal times the critical gain of the activation, convolutions orthogonal as operators,
    recurrent layers orthogonal gate by gate with biases that remember, and attention projections orthogonal one by one.
    Where outputs are more than inputs, weights also grow by the root of that ratio, so that entries keep their size.
    Biases get the variance that belongs to the critical point, usually zero. Embeddings, normalisation layers, frozen
    parameters and modules of unknown kinds keep what they have. A constrained weight (``OrthoLinear`` and the like) is
    redrawn with as much of the gain as its constraint lets through. The report says all of this by name.

    Args:
        model: any module.
        activation: what follows its layers: a name, a module or a function of one number. Where gradients and signals
            cannot both be held without biases (gelu, silu), biases are drawn for the half-stable point.
        kind: ``"orthogonal"``; ``"delta_orthogonal"``, convolutions start as 1×1, for very deep ones and zero padding;
            ``"gaussian"``, independent entries; ``"looks_linear"``, mirrored features under which networks of relu,
            leaky relu, gelu or silu start as a linear isometry (layers in the order of ``model.modules()``, even
            widths).
        gain: instead of the critical one.
        depth: number of layers, to make all of them together nearly an isometry: see :func:`criticality`. Feed inputs
            of root mean square ``input_scale`` then, or use :func:`with_scaled_ends`.
        generator: for reproducible draws, of any device.
        horizon: time steps over which LSTM and GRU layers keep at least half of their state, 100 by default: the root
            mean square of the singular values of ``∂s_horizon/∂s₀`` is 0.5 to 0.8 at the start, for inputs of size up
            to one and ``s = (h, c)`` in an LSTM. Unit by unit, the forget (update) gate is ``f = 1 − 1/T`` with ``T``
            evenly over ``(2, 10 · horizon)``, so that a unit keeps ``f^horizon ≈ exp(−horizon/T)``: 0.76 in root mean
            square. Choose the length of your sequences, or of what connects inputs to outputs.

    Returns:
        A report, to print or to read.

    Raises:
        ValueError: an unknown kind; arguments that exclude each other; lazy or meta parameters; mirrored features
            of an odd number; or an activation without a critical point (give ``gain``).

    Source: Xiao et al., "Dynamical isometry and a mean field theory of CNNs", ICML 2018; Pennington, Schoenholz and
        Ganguli, "Resurrecting the sigmoid in deep learning through dynamical isometry", NeurIPS 2017.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check_materialised(model)
    _check_horizon(model, horizon)
    point = _operating_point(activation, kind, gain, depth)
    warn_if_unstable(point)
    _warn_of_other_activations(model, activation)
    report = Initialization(point.sigma_w, point.sigma_b, point.q, point.input_scale)
    walk = _Walk(model, Draw(kind, generator), point, horizon or HORIZON)
    for name, module in model.named_modules():
        start = walk.start(name, module)
        if start is not None:
            report.layers.append(start)
    return report


class _Walk:
    """Initialises one module after the other, each parameter once."""

    def __init__(self, model: nn.Module, draw: Draw, point: FixedPoint, horizon: int) -> None:
        self.draw, self.point, self.horizon = draw, point, horizon
        # where neither mirrored features nor the centre of a kernel mean anything
        self.square = draw if draw.kind == "gaussian" else Draw("orthogonal", draw.generator)
        self.seen: set[int] = set()
        named = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
        weighted = [module for _, module in named]
        self.ends = {id(weighted[0]): "first", id(weighted[-1]): "last"} if len(weighted) > 1 else {}
        if draw.kind == "looks_linear" and not self.ends:
            raise ValueError(
                f'kind="looks_linear" needs at least two linear layers or convolutions, got {len(weighted)}'
            )
        for name, module in named:  # all of them before the first is changed
            if not is_parametrized(module, "weight") and module.weight.requires_grad:
                try:
                    draw.check(module, self.ends.get(id(module), "hidden"))
                except ValueError as error:
                    raise ValueError(f"{name or '(model)'}: {error}") from None

    def start(self, name: str, module: nn.Module) -> LayerStart | None:
        own = dict(module.named_parameters(recurse=isinstance(module, RECURRENT)))
        kind = type(module).__mro__[1].__name__ if is_parametrized(module) else type(module).__name__
        if is_parametrized(module) and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            if not is_parametrized(module, "weight"):
                return self._weighted(name, kind, module)
            method, scale = self._constrained(module)
            return LayerStart(name, kind, method, scale)
        if not own or name.endswith("parametrizations") or ".parametrizations." in f".{name}.":
            return None
        if any(id(p) in self.seen for p in own.values() if p.ndim > 1):
            return LayerStart(name, kind, "kept: shares its weights with a module above")
        if not any(p.requires_grad for p in own.values()):
            return LayerStart(name, kind, "kept: frozen")
        self.seen.update(map(id, own.values()))
        if isinstance(module, RECURRENT):
            constrained = any(is_parametrized(module, name) for name in weight_names(module) if "_hh" in name)
            gain = 1.0 if constrained else critical_point(as_elementwise(own_activation(module))).sigma_w
            return LayerStart(name, kind, initialize_recurrent(module, self.square, gain, self.horizon), gain)
        if isinstance(module, nn.MultiheadAttention):
            return LayerStart(name, kind, self._attention(module), 1.0)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            return self._weighted(name, kind, module)
        return LayerStart(name, kind, "kept")

    def _weighted(self, name: str, kind: str, module: nn.Module) -> LayerStart:
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not weight.requires_grad:
            return LayerStart(name, kind, "kept: frozen")
        self._bias(module)
        position = self.ends.get(id(module), "hidden")
        gain = 1.0 if self.draw.kind == "looks_linear" and position == "first" else self.point.sigma_w
        method, scale = self._fill(module, weight, gain, position)
        return LayerStart(name, kind, method, scale)

    def _fill(self, module: nn.Module, weight: Tensor, gain: float, position: str) -> tuple[str, float]:
        if not isinstance(module, CONVOLUTIONS):
            return self.draw.kind.removeprefix("delta_").replace("_", " "), self.draw.matrix(weight, gain, position)
        scale, method = self.draw.kernel(module, weight, gain, position)
        if method == "orthogonal kernel" and module.padding_mode == "zeros" and _pads(module):
            method += ", though zero padding loses what leaves the image"
        return method, scale

    def _constrained(self, module: Any) -> tuple[str, float | None]:
        """Assign the draw, then one of norm one; keep the old weight if neither comes back."""
        state = module.parametrizations.weight
        if not any(parameter.requires_grad for parameter in state.parameters()):
            return "kept: frozen", None
        self._bias(module)
        before = copy.deepcopy(state.state_dict())
        with torch.no_grad():
            for gain in (self.point.sigma_w, 1.0):
                target = torch.empty_like(module.weight.detach())
                if isinstance(module, CONVOLUTIONS):
                    scale, method = self.square.kernel(module, target, gain)
                else:
                    scale, method = self.square.matrix(target, gain), self.square.kind
                if gain == 1.0:
                    target, scale = target / scale, 1.0  # without growth, which an orthogonal weight cannot have
                try:
                    module.weight = target
                    found = module.weight.detach()
                except (RuntimeError, NotImplementedError, ValueError):  # a constraint without inverse, or a narrow one
                    continue
                if bool(((found - target).abs() <= 1e-4 * target.abs().max()).all()):
                    return f"{method}, constrained", scale
            state.load_state_dict(before)
        return "kept: its constraint takes no orthogonal weight", None

    def _attention(self, module: nn.MultiheadAttention) -> str:
        with torch.no_grad():
            for name in weight_names(module):
                weight: Tensor = getattr(module, name)
                target = torch.empty_like(weight) if is_parametrized(module, name) else weight
                for block in target.chunk(3) if name == "in_proj_weight" else (target,):
                    self.square.matrix(block, 1.0)
                if target is not weight:
                    setattr(module, name, target)
            if module.in_proj_bias is not None:
                module.in_proj_bias.zero_()
        return "query, key and value each on their own, gain 1"

    def _bias(self, module: nn.Module) -> None:
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            self.draw.normal(bias, self.point.sigma_b)


def _operating_point(activation: ActivationLike, kind: str, gain: float | None, depth: int | None) -> FixedPoint:
    check_depth(depth, "gaussian" if kind == "gaussian" else "orthogonal")
    phi = as_elementwise(activation)
    if gain is not None:
        if not 0 < gain < math.inf:
            raise ValueError(f"gain must be positive and finite, got {gain}")
        if depth is not None:
            raise ValueError(f"depth={depth} chooses the gain, so gain={gain} and depth exclude each other")
    if kind == "looks_linear":
        if depth is not None:
            raise ValueError(f'depth={depth} means nothing for kind="looks_linear", an isometry at every depth')
        gain = (1.0 if gain is None else gain) / odd_slope(phi)
    if gain is not None:
        return FixedPoint(phi.name, gain, 0.0, math.nan, math.nan, math.nan, math.nan, "neutral", math.nan)
    point = critical_point(phi, depth)
    if point.stability == "unstable" and depth is None:
        point = critical_point(phi, bias=True)
    return point


def _check_materialised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet. Run one forward pass before initialising a lazy module.")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device. Call model.to_empty(device=...) first.")


def _check_horizon(model: nn.Module, horizon: int | None) -> None:
    if horizon is None:
        return
    check_horizon(horizon)
    if not any(is_gated(module) for module in model.modules()):
        raise ValueError(f"horizon={horizon} is for LSTM and GRU layers, and model has none: leave it out")


def _warn_of_other_activations(model: nn.Module, activation: ActivationLike) -> None:
    name = activation.lower() if isinstance(activation, str) else type(activation).__name__.lower()
    if not isinstance(activation, str | nn.Module):
        return
    known = {key.replace("_", "") for key, function in NAMED.items() if function is not NAMED["linear"]}
    found = {type(m).__name__ for m in model.modules() if type(m).__name__.lower() in known}
    others = {f for f in found if f.lower() != name.replace("_", "").replace("swish", "silu")}
    if others and len(others) == len(found):
        warnings.warn(
            f"initialised for {name}, but the model's activations are {', '.join(sorted(others))}: "
            f'pass activation="{sorted(others)[0].lower()}"',
            stacklevel=3,
        )


def _pads(module: Convolution) -> bool:
    return module.padding == "same" if isinstance(module.padding, str) else any(module.padding)
