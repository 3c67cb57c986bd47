"""Checks 1 to 28 of the battery: input that training scripts really produce, and input that they should not."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from _battery_contestants import Contestant, Refused, clear, free_of, gaussian, tolerance
from torch import Tensor, nn

N = 8


def works_or_refuses(subject: Contestant, build: Callable[[], Any], witness: Any = None) -> None:
    """Pass if ``build`` gives a layer that keeps its promise, or a clear error that leaves ``witness`` as it was."""
    before = copy.deepcopy(list(witness.state_dict().items())) if witness is not None else []
    try:
        layer = build()
        subject.check(layer)
    except Exception as error:
        if not clear(error):
            raise
        if witness is not None:
            after = list(witness.state_dict().items())
            same = [key for key, _ in before] == [key for key, _ in after] and all(
                torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))
                for (_, old), (_, new) in zip(before, after, strict=True)
            )
            if not same:
                raise Refused(f"refused, after it had changed the layer: {error}") from error


def both_ways(subject: Contestant, weight: Tensor) -> None:
    """A layer made from a plain one with this weight, then a layer whose free tensor becomes this matrix."""
    works_or_refuses(subject, lambda: subject.wrapped(weight))
    layer = subject.layer(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        free_of(layer).copy_(weight.reshape(free_of(layer).shape))
    works_or_refuses(subject, lambda: layer)


def conditioned(kappa: float) -> Tensor:
    """Singular values spread by logarithm from one down to ``1 / kappa``."""
    u, _, vh = torch.linalg.svd(gaussian(N, N, dtype=torch.float64))
    return ((u * torch.logspace(0, -torch.tensor(kappa).log10().item(), N, dtype=torch.float64)) @ vh).float()


def zero(subject: Contestant) -> None:
    """A zero matrix gives a weight that keeps the promise, with finite gradients, or a clear error."""
    both_ways(subject, torch.zeros(N, N))


def rank_one(subject: Contestant) -> None:
    """Likewise a matrix of rank one."""
    both_ways(subject, torch.outer(gaussian(N), gaussian(N, seed=2)))


def kappa_1e4(subject: Contestant) -> None:
    """Likewise condition 1e4."""
    both_ways(subject, conditioned(1e4))


def kappa_1e8(subject: Contestant) -> None:
    """Likewise condition 1e8."""
    both_ways(subject, conditioned(1e8))


def kappa_1e12(subject: Contestant) -> None:
    """Likewise condition 1e12."""
    both_ways(subject, conditioned(1e12))


def subnormal(subject: Contestant) -> None:
    """Likewise entries of 1e-40."""
    both_ways(subject, (gaussian(N, N, dtype=torch.float64) * 1e-40).float())


def scale_1e_30(subject: Contestant) -> None:
    """Likewise entries of 1e-30."""
    both_ways(subject, gaussian(N, N) * 1e-30)


def scale_1e10(subject: Contestant) -> None:
    """Likewise entries of 1e10."""
    both_ways(subject, gaussian(N, N) * 1e10)


def scale_1e30(subject: Contestant) -> None:
    """Likewise entries of 1e30."""
    both_ways(subject, gaussian(N, N) * 1e30)


def scale_1e3(subject: Contestant) -> None:
    """Likewise a free tensor multiplied by a thousand, as a large step leaves it."""
    layer = subject.layer(N)
    with torch.no_grad():
        free_of(layer).mul_(1e3).add_(gaussian(*free_of(layer).shape) * 1e3)
    works_or_refuses(subject, lambda: layer)


def _poisoned(subject: Contestant, value: float) -> None:
    layer = subject.layer(N)
    with torch.no_grad():
        free_of(layer)[1, 0] = value  # below the diagonal, where every method reads
    try:
        layer(torch.ones(2, N))
    except Exception as error:
        if not clear(error):
            raise
        return
    raise Refused("no error: the forward pass went on")


def nan(subject: Contestant) -> None:
    """A NaN in the free tensor raises at the next forward pass."""
    _poisoned(subject, torch.nan)


def inf(subject: Contestant) -> None:
    """An Inf in the free tensor raises at the next forward pass."""
    _poisoned(subject, torch.inf)


def _empty(subject: Contestant, n: int, out: int) -> None:
    def build() -> Any:
        layer = subject.layer(n, out)
        if layer(torch.ones(3, n)).shape != (3, out):
            raise Refused("output of another shape")
        return layer

    works_or_refuses(subject, build)


def empty_in(subject: Contestant) -> None:
    """No input features: works, or a clear error."""
    _empty(subject, 0, 3)


def empty_out(subject: Contestant) -> None:
    """No output features: works, or a clear error."""
    _empty(subject, 3, 0)


def empty_batch(subject: Contestant) -> None:
    """A batch of none gives an output of none and finite gradients."""
    layer = subject.layer(N, 4)
    result = layer(torch.ones(0, N))
    if result.shape != (0, 4):
        raise Refused(f"shape {tuple(result.shape)}")
    result.sum().backward()
    subject.check(layer)


def wide(subject: Contestant) -> None:
    """64 inputs to 4 outputs keep the promise."""
    subject.check(subject.layer(64, 4))


def tall(subject: Contestant) -> None:
    """4 inputs to 64 outputs keep the promise."""
    subject.check(subject.layer(4, 64))


def _cast(subject: Contestant, dtype: torch.dtype) -> None:
    def build() -> Any:
        layer = subject.layer(N).to(dtype)
        with torch.no_grad():
            free_of(layer).add_(gaussian(*free_of(layer).shape, dtype=dtype) * 0.1)
        if layer(torch.ones(2, N, dtype=dtype)).dtype != dtype:
            raise Refused("output of another dtype")
        return layer

    works_or_refuses(subject, build)


def float64(subject: Contestant) -> None:
    """``.double()`` keeps the promise, with more than float32 digits in the weight."""
    _cast(subject, torch.float64)
    layer = subject.layer(N).double()
    with torch.no_grad():
        free_of(layer).add_(gaussian(*free_of(layer).shape, dtype=torch.float64) * 0.1)
    weight = layer.weight
    if torch.equal(weight.float().double(), weight):
        raise Refused("the weight is rounded to float32")


def bf16(subject: Contestant) -> None:
    """``.bfloat16()`` keeps the promise to four units in the last place, or gives a clear error."""
    _cast(subject, torch.bfloat16)


def fp16(subject: Contestant) -> None:
    """``.half()`` keeps the promise to four units in the last place, or gives a clear error."""
    _cast(subject, torch.float16)


def meta_device(subject: Contestant) -> None:
    """Built on the meta device, given memory and a real layer's state dict, it is that layer; or it is not built."""
    real = subject.layer(N, 4)
    try:
        layer = subject.layer(N, 4, seed=5, device="meta")
    except Exception as error:
        if clear(error):
            return
        raise
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(real.state_dict())
    subject.check(layer)
    if not torch.allclose(layer.eval().weight, real.eval().weight, atol=1e-5):
        raise Refused("another weight than the real layer's")


def non_contiguous(subject: Contestant) -> None:
    """A transposed weight and a strided input give the output of their contiguous copies."""
    linear = nn.Linear(N, N)
    linear.weight = nn.Parameter(gaussian(N, N).mT)
    plain = nn.Linear(N, N)
    plain.load_state_dict(linear.state_dict())
    torch.manual_seed(0)
    layer = subject.wrap(linear)
    torch.manual_seed(0)
    other = subject.wrap(plain)
    x = gaussian(4, 2 * N)[:, ::2]
    if not torch.allclose(layer.eval()(x), other.eval()(x.contiguous()), atol=1e-5):
        raise Refused("another output than for contiguous tensors")
    subject.check(layer)


def frozen(subject: Contestant) -> None:
    """A layer with ``requires_grad=False`` stays frozen, and passes gradients on to its input."""
    linear = nn.Linear(N, N).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(gaussian(N, N))
    layer = subject.wrap(linear)
    x = torch.ones(2, N, requires_grad=True)
    layer(x).square().sum().backward()
    if free_of(layer).requires_grad or x.grad is None or not x.grad.isfinite().all():
        raise Refused("unfrozen, or without a gradient for the input")
    subject.check(layer)


def tied(subject: Contestant) -> None:
    """Two layers on one parameter keep the promise and stay equal through a step, or there is a clear error."""
    first, second = nn.Linear(N, N), nn.Linear(N, N)
    second.weight = first.weight

    def build() -> Any:
        layers = [subject.wrap(first), subject.wrap(second)]
        if layers[0] is not first:  # a class of layers: its users tie the free tensors
            layers[1].parametrizations.weight.original = free_of(layers[0])
        free = {id(free_of(layer)): free_of(layer) for layer in layers}
        optimizer = torch.optim.SGD(free.values(), 0.1)
        layers[1](layers[0](gaussian(4, N))).square().sum().backward()
        optimizer.step()
        subject.check(layers[0])
        if not torch.allclose(layers[0].weight, layers[1].weight, atol=1e-3):
            raise Refused("no longer tied, without a word")
        return layers[1]

    works_or_refuses(subject, build)


def complex_weight(subject: Contestant) -> None:
    """A complex layer is made unitary, or refused in words with nothing changed."""
    linear = nn.Linear(N, N, dtype=torch.complex64)
    try:
        weight = subject.wrap(linear).weight.detach()
        values = torch.linalg.svdvals(weight)
        if not weight.is_complex() or not (values - 1).clamp_min(0).max() <= tolerance(torch.float32):
            raise Refused("silently another matrix")
    except Exception as error:
        if not clear(error):
            raise
        if hasattr(linear, "parametrizations"):
            raise Refused(f"refused, after it had changed the layer: {error}") from error


def lazy(subject: Contestant) -> None:
    """An ``nn.LazyLinear`` that has no shape yet is constrained once it has, or refused in words."""
    linear = nn.LazyLinear(N)

    def build() -> Any:
        layer = subject.wrap(linear)
        layer(torch.ones(2, N))
        return layer

    try:
        works_or_refuses(subject, build)
    finally:
        if isinstance(linear, nn.LazyLinear) and hasattr(linear, "parametrizations"):
            raise Refused("half constrained")


def wrapping_nan(subject: Contestant) -> None:
    """Constraining a plain layer that holds NaN raises and leaves it plain, or gives a proper weight."""
    linear = nn.Linear(N, N)
    with torch.no_grad():
        linear.weight[2, 1] = torch.nan
    works_or_refuses(subject, lambda: subject.wrap(linear), witness=linear)


def applied_twice(subject: Contestant) -> None:
    """A second constraint on the same weight raises and changes nothing, or the promise still holds."""
    layer = subject.layer(N)

    def build() -> Any:
        subject.again(layer)
        return layer

    works_or_refuses(subject, build, witness=layer)


CHECKS = [
    ("zero", zero),
    ("rank one", rank_one),
    ("condition 1e4", kappa_1e4),
    ("condition 1e8", kappa_1e8),
    ("condition 1e12", kappa_1e12),
    ("subnormal", subnormal),
    ("scale 1e-30", scale_1e_30),
    ("scale 1e10", scale_1e10),
    ("scale 1e30", scale_1e30),
    ("free tensor x 1e3", scale_1e3),
    ("NaN", nan),
    ("Inf", inf),
    ("empty in", empty_in),
    ("empty out", empty_out),
    ("empty batch", empty_batch),
    ("wide", wide),
    ("tall", tall),
    ("float64", float64),
    ("bfloat16", bf16),
    ("float16", fp16),
    ("meta device", meta_device),
    ("non-contiguous", non_contiguous),
    ("frozen", frozen),
    ("tied", tied),
    ("complex", complex_weight),
    ("lazy", lazy),
    ("wrapping a NaN layer", wrapping_nan),
    ("applied twice", applied_twice),
]
