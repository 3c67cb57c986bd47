"""Every convolution that can be built keeps its bound: at the start, after training, and from any raw tensors."""

import os
import re
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthogonium import layers
from orthogonium.reparametrizers import PRESETS
from tests.operators import allowance, materialise, spectrum

DRAWS = int(os.environ.get("ORTHOGONIUM_CONV_DRAWS", "200"))
LARGEST = 300  # inputs of the materialised operator
DOCUMENTED = re.compile(
    r"no orthogonal kernel|groups=\d+ must divide|padding_mode=.* repeats pixels|overlap|wraps around|holds no window|"
    r"output_padding="
)


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3, 4]))
    channels = st.integers(1, 12)
    if draw(st.booleans()):  # groups that divide, more often than chance would have it
        channels = st.integers(1, 12 // groups).map(lambda n: n * groups)
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(dims))
    arguments = {
        "in_channels": draw(channels),
        "out_channels": draw(channels),
        "kernel_size": kernel,
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "dilation": tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(dims)),
        "groups": groups,
        "padding": draw(st.sampled_from(["same", "same", "valid", 0, 1, 2, 3])),
        "padding_mode": draw(st.sampled_from(["circular"] * 4 + ["zeros"] * 3 + ["reflect"])),
        "ortho_params": PRESETS[draw(st.sampled_from(sorted(PRESETS)))],
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
    }
    if transposed:
        arguments["output_padding"] = draw(st.sampled_from([0, 0, 0, 1]))
    sides = [draw(st.integers(1 if transposed else k, 9)) for k in kernel]
    while arguments["in_channels"] * prod(sides) > LARGEST and max(sides) > 1:
        largest = max(range(dims), key=lambda axis: sides[axis])
        sides[largest] -= 1
    name = f"OrthoConv{'Transpose' if transposed else ''}{dims}d"
    return name, arguments, tuple(sides), draw(st.integers(0, 999))


def check_bound(layer, sides, stage):
    matrix = materialise(layer, sides)
    if matrix.numel() == 0:
        return
    values, slack = spectrum(matrix), allowance(matrix, layer.weight.dtype, layer.groups)
    assert values[-1] <= 1 + slack, f"{stage}: largest singular value {values[-1]:.9f}"
    geometry = layer.geometry
    outputs, inputs, windows = layer.out_channels, layer.in_channels, None
    if layer.transposed:
        outputs, inputs, windows = inputs, outputs, sides
        sides = layer(torch.zeros(1, layer.in_channels, *sides, dtype=layer.weight.dtype)).shape[2:]
    core = prod(min(k, s) for k, s in zip(geometry.kernel_size, geometry.stride, strict=True))
    keeps_rows = outputs <= inputs * core and (geometry.circular or not any(map(sum, geometry.pads)))
    tiled = geometry.is_tiled(sides)
    if windows is not None:  # more output_padding than the stride leaves positions that no window reads
        tiled = tiled and all(n * s == side for n, s, side in zip(windows, geometry.stride, sides, strict=True))
    if keeps_rows or tiled:
        assert values[0] >= 1 - slack, f"{stage}: smallest singular value {values[0]:.9f}"


def train(layer, sides, steps=100, rate=5.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_channels, *sides, generator=generator, dtype=layer.weight.dtype)
    target = torch.randn(layer(x).shape, generator=generator, dtype=x.dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) * target).mean().backward()  # linear, so that the bias cannot run away
        optimizer.step()


@settings(max_examples=DRAWS, deadline=None, derandomize=DRAWS <= 200, suppress_health_check=list(HealthCheck))
@given(cases())
def test_either_a_documented_error_or_the_bound(case):
    name, arguments, sides, seed = case
    torch.manual_seed(seed)
    try:
        layer = getattr(layers, name)(**arguments)
        layer(torch.zeros(1, layer.in_channels, *sides, dtype=layer.weight.dtype))
    except ValueError as error:
        if not DOCUMENTED.search(str(error)):
            raise
        return
    check_bound(layer, sides, "at the start")
    train(layer, sides)
    check_bound(layer, sides, "after training")
    check_bound(layer.eval(), sides, "in evaluation mode")
    raw = [p for key, p in layer.named_parameters() if key != "bias"]
    for scale in (1e-3, 1.0, 1e3):
        with torch.no_grad():
            for parameter in raw:
                parameter.normal_().mul_(scale)
        check_bound(layer, sides, f"noise of scale {scale}")


CASES = {
    "k3 s2 on 7x7, 8 to 8": ("OrthoConv2d", (8, 8, 3), {"stride": 2}, (7, 7)),
    "k3 s2 on 7x7, 4 to 16": ("OrthoConv2d", (4, 16, 3), {"stride": 2}, (7, 7)),
    "k3 s2 on 9x9, 8 to 8": ("OrthoConv2d", (8, 8, 3), {"stride": 2}, (9, 9)),
    "k3 s2 on 9x9, 4 to 16": ("OrthoConv2d", (4, 16, 3), {"stride": 2}, (9, 9)),
    "k7 s2 on 9x9": ("OrthoConv2d", (4, 4, 7), {"stride": 2}, (9, 9)),
    "padding 3 for k3, zeros": ("OrthoConv2d", (4, 4, 3), {"padding": 3, "padding_mode": "zeros"}, (5, 5)),
    "groups 4": ("OrthoConv2d", (8, 12, 3), {"groups": 4}, (5, 6)),
    "even kernel": ("OrthoConv2d", (4, 4, 4), {}, (5, 6)),
    "even kernel, stride 2": ("OrthoConv2d", (4, 8, (4, 2)), {"stride": 2}, (6, 6)),
    "1x1 stride 2, 8 to 4": ("OrthoConv2d", (8, 4, 1), {"stride": 2}, (6, 6)),
    "k3 s2, 16 to 64": ("OrthoConv2d", (16, 64, 3), {"stride": 2}, (6, 6)),
    "depthwise": ("OrthoConv2d", (6, 6, 3), {"groups": 6}, (5, 5)),
    "depthwise, two per group": ("OrthoConv2d", (6, 12, 3), {"groups": 6, "stride": 2}, (6, 6)),
    "dilation 2, stride 3": ("OrthoConv2d", (2, 4, 4), {"dilation": 2, "stride": 3}, (9, 6)),
    "transposed, output_padding": (
        "OrthoConvTranspose2d",
        (8, 4, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
        (4, 4),
    ),
    "transposed k3 s2, same": ("OrthoConvTranspose2d", (16, 4, 3), {"stride": 2}, (3, 4)),
    "transposed 1x1 stride 2": ("OrthoConvTranspose2d", (4, 8, 1), {"stride": 2}, (3, 3)),
    "transposed k4 s2 p1, zeros": (
        "OrthoConvTranspose2d",
        (4, 4, 4),
        {"stride": 2, "padding": 1, "padding_mode": "zeros"},
        (4, 4),
    ),
    "three dimensions": ("OrthoConv3d", (4, 4, (3, 2, 1)), {"stride": (2, 1, 1)}, (4, 3, 2)),
    "one dimension, transposed": ("OrthoConvTranspose1d", (3, 5, 5), {"stride": 3, "dilation": 2}, (4,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_named_cases(case, dtype):
    name, sizes, keywords, sides = CASES[case]
    torch.manual_seed(0)
    layer = getattr(layers, name)(*sizes, **keywords, dtype=dtype)
    check_bound(layer, sides, case)
    train(layer, sides)
    check_bound(layer, sides, case)


REFUSED = {
    "k3 s2 padding 1 on 7x7": ({"stride": 2, "padding": 1}, (4, 4, 3), (7, 7), "4 windows that overlap"),
    "k7 s2 padding 3 on 9x9": ({"stride": 2, "padding": 3}, (4, 4, 7), (9, 9), "5 windows that overlap"),
    "padding 3 for k3": ({"padding": 3}, (4, 4, 3), None, r"at most 2 in total"),
    "reflect": ({"padding_mode": "reflect"}, (4, 4, 3), None, "reflect"),
    "replicate": ({"padding_mode": "replicate"}, (4, 4, 3), None, "replicate"),
    "unknown mode": ({"padding_mode": "mirror"}, (4, 4, 3), None, "mirror"),
    "1x1 stride 2 with too many outputs": ({"stride": 2}, (4, 8, 1), None, "room for 4 channels"),
    "dilation and stride share a factor": ({"stride": 2, "dilation": 2}, (4, 4, 3), None, "share the factor 2"),
    "groups": ({"groups": 3}, (4, 6, 3), None, "groups=3 must divide in_channels=4 .*: 1, 2"),
    "image smaller than padding": ({}, (4, 4, 5), (1, 1), "wraps around more than once"),
    "image smaller than the kernel": ({"padding": "valid"}, (4, 4, 5), (3, 3), "no window of length 5"),
    "channels": ({}, (0, 4, 3), None, "in_channels must be at least 1"),
    "kernel": ({}, (4, 4, (3, 3, 3)), None, "kernel_size must have 2 entries"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_numbers(case):
    keywords, sizes, sides, message = REFUSED[case]
    if sides is None:
        with pytest.raises(ValueError, match=message):
            layers.OrthoConv2d(*sizes, **keywords)
    else:
        layer = layers.OrthoConv2d(*sizes, **keywords)
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(1, 4, *sides))
