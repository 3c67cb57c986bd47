"""Calls with arguments drawn at random: no constant below a slope or a secant, no error below what float32 rounds."""

import random

import pytest
import torch
from torch.nn import functional as F

from orthogonium.certification.forward_error import SizeRecorder, forward_error
from orthogonium.certification.network import analyse
from orthogonium.certification.program import run
from orthogonium.certification.rounding import BINARY64, Arithmetic
from tests.certification.test_rules import Call, bound_without_shape, slopes

SCALES = (1e-6, 1e-2, 1.0, 30.0, 3e3)
ELEMENTWISE = [
    "relu",
    "relu6",
    "softsign",
    "tanhshrink",
    "tanh",
    "sigmoid",
    "hardsigmoid",
    "hardswish",
    "silu",
    "mish",
    "selu",
    "logsigmoid",
]


def drawn(seed):
    """``(text of a call, shape of one input)``, many of them."""
    draw = random.Random(seed)
    one_of, whole = draw.choice, draw.randint
    dims = one_of([1, 2])
    sides = tuple(whole(3, 6) for _ in range(dims))

    def size(least=1, most=3):
        return one_of([whole(least, most), tuple(whole(least, most) for _ in range(dims))])

    def number():
        return one_of([-3.0, -0.7, 0.0, 0.1, 1 / 3, 1.0, 2.5, 7.0])

    def flag():
        return one_of([True, False])

    window, stride, dilation, groups = size(), one_of([None, size(), size()]), size(1, 2), one_of([1, 2])
    half = whole(0, (min(window) if isinstance(window, tuple) else window) // 2)
    axis, axes = one_of([1, -1]), one_of([(1,), (-1,), (1, 2), (-1, -2)])
    linear = "linear" if dims == 1 else "bilinear"
    mode, corners = one_of([("nearest", None), ("nearest-exact", None), (linear, None), (linear, True)])
    pads = tuple(whole(-1, 2) for _ in range(2 * dims))
    padding = one_of([0, 1, 2, "same", "valid"])
    step = 1 if padding == "same" else size()
    kernel = tuple(whole(1, 3) for _ in range(dims))
    divisor = one_of([None, 1, 3, -2])
    override = f", {divisor}" if dims == 2 else ""
    low, slope, positive = one_of([None, number()]), number(), abs(number()) + 0.05
    texts = [
        f"F.max_pool{dims}d(x, {window}, {stride}, {half}, {dilation}, {flag()})",
        f"F.avg_pool{dims}d(x, {window}, {stride}, {half}, {flag()}, {flag()}{override})",
        *(f"F.adaptive_{kind}_pool{dims}d(x, {size(1, 8)})" for kind in ("avg", "max")),
        f"F.interpolate(x, size={size(1, 9)}, mode={mode!r}, align_corners={corners})",
        f"F.interpolate(x, None, {one_of([0.6, 1.3, 2, 2.7])}, {mode!r}, {corners}, {flag()})",
        f"F.pad(x, {pads}, {one_of(['reflect', 'replicate', 'circular'])!r})",
        f"F.pad(x, {pads}, value={number()})",
        *(f"x.{name}({axes}, {flag()})" for name in ("mean", "sum", "amax", "amin", "logsumexp")),
        f"torch.norm(x, {one_of([2, repr('fro')])}, {axes}, {flag()})",
        *(f"F.{name}(x, dim={axis})" for name in ("softmax", "softmin", "log_softmax")),
        f"torch.sort(x, {axis}, {flag()})[0]",
        f"x.topk(2, {axis}, {flag()})[0]",
        *(f"x.{name}({axis}, {flag()}).values" for name in ("max", "min")),
        f"x.clamp({low}, {number()})",
        *(f"F.{name}(x, {slope})" for name in ("leaky_relu", "elu")),
        *(f"F.{name}(x, {positive})" for name in ("celu", "softshrink", "softplus")),
        f"F.threshold(x, {slope}, {slope})",
        f"F.hardtanh(x, {-positive}, {abs(slope)})",
        f"F.gelu(x, approximate={one_of(['none', 'tanh'])!r})",
        f"F.{one_of(ELEMENTWISE)}(x)",
        f"torch.lerp(x, x.flip({axis}), {slope})",
        f"{slope} * x / {positive} - {number()}",
        "torch.maximum(x[:, :1], x) - x[..., :1]",
        f"F.conv{dims}d(x, randn(4, {2 // groups}, *{kernel}), randn(4), {step}, {padding!r}, {dilation}, {groups})",
        f"F.conv_transpose{dims}d(x, randn(2, 3, *{kernel}), None, {size(2, 3)}, {one_of([0, 1])}, {one_of([0, 1])})",
        f"F.batch_norm(x, randn(2), randn(2) ** 2, randn(2), None, False, 0.1, {one_of([1e-5, 1e-12, 0.1])})",
        f"torch.roll(x, {whole(-2, 2)}, {axis})",
    ]
    return [(text, (2, *sides)) for text in texts]


def fixed_numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("seed", range(8))
def test_no_drawn_argument_makes_a_bound_false(seed):
    accepted = [text for text, shape in drawn(seed) if holds(text, shape)]
    assert len(accepted) >= 25  # the others are arguments that torch, or a rule, does not take


def holds(text, shape):
    """Whether a bound is given; fails where it is false."""
    function = eval(f"lambda x: {text}", {"torch": torch, "F": F, "randn": fixed_numbers})
    module = Call(function, text).eval()
    try:
        network = analyse(module, shape)
        alone = bound_without_shape(module) or network.bound
    except (TypeError, ValueError):
        return False
    scales = torch.tensor(SCALES, dtype=torch.float64).view(-1, *(1,) * len(shape))
    generator = torch.Generator().manual_seed(len(text))
    x = torch.randn(len(SCALES), *shape, generator=generator, dtype=torch.float64) * scales
    steepest = max(map(float, slopes(network, x[1:4])))
    assert steepest <= min(alone, network.bound) * (1 + 1e-9), text
    narrow, recorder, values = x.float().double(), SizeRecorder(network), {}
    run(network.program, narrow, results=values, visit=recorder)
    here = torch.zeros(len(x), dtype=torch.float64)
    fine = forward_error(network, recorder.sizes, here, BINARY64)
    coarse = forward_error(network, recorder.sizes, here, Arithmetic.of(torch.float32), fine)
    with torch.no_grad():
        exact = values[network.output]
        apart = (network.program(narrow + 0.1) - exact).reshape(len(x), -1).norm(dim=1)
        off = (analyse(module, shape).program.float()(narrow.float()) - exact).reshape(len(x), -1).norm(dim=1)
    distance = 0.1 * x[0].numel() ** 0.5
    assert (apart <= network.bound * distance * (1 + 1e-9) + 1e-8 + 1e-12 * exact.reshape(len(x), -1).norm(dim=1)).all()
    assert (off <= coarse[network.output] + fine[network.output]).all(), text
    return True
