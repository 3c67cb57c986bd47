"""Upper bounds on convolutions: never below the operator that torch computes, over every argument."""

import math
from itertools import product

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.linalg import NonFiniteError, _kernel_gram, absolute_kernel_norm_bound, kernel_bound, kernel_norm_bound
from orthogonium.linalg.kernel_spectrum import circular_singular_values
from tests.helpers import gaussian

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MODES = ["zeros", "circular", "reflect", "replicate"]
LIMITS = {1: (6, 7, 9), 2: (3, 4, 6), 3: (2, 3, 3)}  # channels per group, kernel, image side


def pairs(padding, kernel_size, stride, dilation):
    if padding == "same":
        totals = [max(0, d * (k - 1) + 1 - s) for k, s, d in zip(kernel_size, stride, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if padding == "valid":
        return [(0, 0)] * len(kernel_size)
    return [p if isinstance(p, tuple) else (p, p) for p in padding]


def operator(
    kernel, image_size, stride, padding, dilation, groups, padding_mode, transposed=False, output_padding=None
):
    """The matrix, from torch's response to every impulse in float64; circular if transposed: the border folded back."""
    kernel, dims = kernel.double(), kernel.ndim - 2
    pads = pairs(padding, kernel.shape[2:], stride, dilation)
    channels = kernel.shape[0] if transposed else kernel.shape[1] * groups
    shape = (channels, *image_size)
    images = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    if not transposed:
        around = [p for pair in reversed(pads) for p in pair]
        if any(around):
            images = F.pad(images, around, mode="constant" if padding_mode == "zeros" else padding_mode)
        return CONVOLUTIONS[dims](images, kernel, None, stride, 0, dilation, groups).flatten(1).T
    wide = TRANSPOSED[dims](images, kernel, None, stride, 0, output_padding, groups, dilation)
    for axis, (before, after) in enumerate(pads):
        side = wide.shape[2 + axis] - before - after
        core = wide.narrow(2 + axis, before, side).clone()
        if padding_mode == "circular":
            core.narrow(2 + axis, side - before, before).add_(wide.narrow(2 + axis, 0, before))
            core.narrow(2 + axis, 0, after).add_(wide.narrow(2 + axis, before + side, after))
        wide = core
    return wide.flatten(1).T


def norm(matrix):
    """From below: the float64 singular value less what it may have been rounded up by."""
    return float(torch.linalg.matrix_norm(matrix, ord=2)) * (1 - 4 * max(matrix.shape) * 2.0**-52)


@st.composite
def convolutions(draw):
    """Arguments that torch accepts, with a kernel of any shape and spectrum."""
    dims = draw(st.integers(1, 3))
    channels, largest, widest = LIMITS[dims]
    axis = st.integers(1, 3)
    transposed = draw(st.booleans()) if draw(st.booleans()) else False
    groups = draw(st.integers(1, 2))
    size = [draw(st.integers(1, largest)) for _ in range(dims)]
    stride, dilation = [draw(axis) for _ in range(dims)], [draw(axis) for _ in range(dims)]
    padding_mode = draw(st.sampled_from(MODES[:2] if transposed else MODES))
    kind = draw(st.sampled_from(["same", "valid", "ints", "pairs"]))
    amount = st.integers(0, 3)
    if kind == "ints":
        padding = tuple(draw(amount) for _ in range(dims))
    elif kind == "pairs":
        padding = [(draw(amount), draw(amount)) for _ in range(dims)]
    else:
        padding = kind
    image = [draw(st.integers(1, widest)) for _ in range(dims)]
    output_padding = [0] * dims
    if transposed:
        output_padding = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sides = image
    pads = pairs(padding, size, stride, dilation)
    extents = [d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)]
    if transposed:
        terms = zip(image, stride, extents, output_padding, pads, strict=True)
        sides = [(w - 1) * s + e + more - sum(pad) for w, s, e, more, pad in terms]
        assume(min(sides) > 0)
    assume(all(n + sum(pad) >= e for n, pad, e in zip(sides, pads, extents, strict=True)) or transposed)
    if padding_mode in ("circular", "reflect"):
        assume(all(max(pad) <= n - (padding_mode == "reflect") for pad, n in zip(pads, sides, strict=True)))
    inner, outer = draw(st.integers(1, channels)), draw(st.integers(1, channels))
    kernel = gaussian((outer * groups, inner, *size), seed=draw(st.integers(0, 10**6)))
    kernel = kernel + draw(st.sampled_from([0.0, 0.0, 1.0]))  # smooth kernels have their largest value at frequency 0
    return kernel, {
        "image_size": image,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "transposed": transposed,
        "output_padding": output_padding,
    }


@given(convolutions())
def test_never_below_the_operator(drawn):
    kernel, arguments = drawn
    matrix = operator(kernel, **arguments)
    truth, absolute = norm(matrix), norm(matrix.abs())
    written = kernel_norm_bound(kernel, **arguments)
    assert truth <= written <= truth * (1 + 1e-4)
    assert absolute <= absolute_kernel_norm_bound(kernel, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_bound, "_WRITTEN_OUT", 0)  # by frequencies alone, as for large images
        assert truth <= kernel_norm_bound(kernel, **arguments)
    del arguments["image_size"]
    assert truth <= kernel_norm_bound(kernel, **arguments)
    assert absolute <= absolute_kernel_norm_bound(kernel, **arguments)


@given(
    mode=st.sampled_from(MODES),
    k=st.integers(1, 3),
    s=st.integers(1, 2),
    side=st.integers(3, 6),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    orthogonal=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_never_below_forty_digits(mode, k, s, side, channels, orthogonal, seed):
    """With no allowance at all: sums of these taps are exact, and the singular values are those of mpmath."""
    kernel = gaussian((*channels, k), seed=seed).bfloat16()
    if orthogonal:  # a shift, whose bound leaves the least room
        kernel = torch.zeros_like(kernel)
        kernel[0, 0, k // 2] = 1.1
    matrix = operator(kernel, (side,), (s,), "same", (1,), 1, mode)
    with mpmath.workdps(40):
        truth = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)[0]
    arguments = {"stride": s, "padding": "same", "padding_mode": mode}
    assert truth <= kernel_norm_bound(kernel, side, **arguments)
    assert truth <= kernel_norm_bound(kernel, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_bound, "_WRITTEN_OUT", 0)
        assert truth <= kernel_norm_bound(kernel, side, **arguments)


def test_it_would_notice():
    """Each ingredient of the bound, left out, gives numbers below the truth in the same comparison."""
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    cases = {
        "stride": ({"stride": (2, 2), "padding": "same", "padding_mode": "circular"}, {"stride": (1, 1)}),
        "replicate": ({"padding": (2, 2), "padding_mode": "replicate"}, {"padding_mode": "zeros"}),
        "circular": ({"padding": (3, 3), "padding_mode": "circular"}, {"padding": (1, 1)}),
    }
    plain = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0), "padding_mode": "zeros"}
    for name, (arguments, changed) in cases.items():
        smooth = kernel + (3 if name == "replicate" else 0)
        matrix = operator(smooth, image_size=(4, 4), **(plain | arguments))
        assert norm(matrix) <= kernel_norm_bound(smooth, (4, 4), **(plain | arguments))
        if name != "stride":
            assert norm(matrix) > kernel_norm_bound(smooth, (4, 4), **(plain | arguments | changed))
    grid = circular_singular_values(kernel, (4, 4), (1, 1), (1, 1))[0]  # of one size: below the truth of another
    larger = norm(operator(kernel, (5, 5), (1, 1), "same", (1, 1), 1, "circular"))
    assert max(float(grid), larger) <= kernel_norm_bound(kernel, padding="same", padding_mode="circular")
    rounded = [
        float(circular_singular_values(kernel * x, (4, 4), (1, 1), (1, 1))[0].float()) / x for x in (1, 1.1, 1.3)
    ]
    assert min(rounded) < norm(operator(kernel, (4, 4), (1, 1), "same", (1, 1), 1, "circular"))


@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize(
    ("channels", "size", "stride", "dilation"),
    [
        ((3, 5), (3, 3), 1, 1),
        ((5, 3), (2, 4), 1, 2),
        ((8, 4), (3, 3), 2, 1),
        ((4, 3), (5,), 3, 2),
        ((2, 2), (3,) * 3, 1, 1),
    ],
    ids=str,
)
def test_tight_without_an_image_size(channels, size, stride, dilation, mode):
    """Never below large images, and within 0.05 % of what they come to; 2 % in three dimensions."""
    kernel = gaussian((*channels, *size), seed=0)
    dims = len(size)
    stride, dilation = (stride,) * dims, (dilation,) * dims
    bound = kernel_norm_bound(kernel, None, stride, "same", dilation, padding_mode=mode, stride_divides=True)
    side = {1: 600, 2: 48, 3: 36}[dims]
    found = max(
        float(circular_singular_values(kernel, (side + i * stride[0],) * dims, stride, dilation)[0]) for i in range(2)
    )
    assert found <= bound <= found * (1.0007 if dims < 3 else 1.02)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 8, 5), (2, 2, 2, 3, 2), (8, 1, 3, 3)], ids=str)
def test_circular_by_frequency_is_exact(shape, groups):
    kernel = gaussian(shape, seed=1)
    dims = kernel.ndim - 2
    for side, stride in product((6, 12), (1, 2, 3)):
        sides, strides, ones = (side,) * dims, (stride,) * dims, (1,) * dims
        truth = float(circular_singular_values(kernel, sides, strides, ones, groups)[0])
        arguments = {"stride": strides, "padding": "same", "groups": groups, "padding_mode": "circular"}
        assert truth * (1 - 1e-13) <= kernel_norm_bound(kernel, sides, **arguments) <= truth * (1 + 1e-4)


@pytest.mark.parametrize(
    ("sizes", "keywords"),
    [((4, 8, 3), {}), ((8, 4, 5), {"stride": 2}), ((4, 16, 3), {"stride": 2}), ((8, 8, 3), {"groups": 4})],
)
def test_tight_for_orthogonal_kernels_at_any_size(sizes, keywords):
    torch.manual_seed(0)
    layer = og.OrthoConv2d(*sizes, **keywords, dtype=torch.float64)
    arguments = {"stride": layer.stride, "padding": layer.geometry.pads, "groups": layer.groups}
    for mode in ("zeros", "circular"):
        bound = kernel_norm_bound(layer.weight, padding_mode=mode, stride_divides=True, **arguments)
        assert 1 - 1e-12 <= bound <= 1 + 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [-40, -12, 0, 12, 1000, -1060])
def test_dtypes_and_scales(dtype, power):
    if abs(power) > 12 and dtype != torch.float64:
        return  # out of the range of this type
    kernel = torch.ldexp(gaussian((3, 2, 3, 3)), torch.tensor(power)).to(dtype)
    scaled = torch.ldexp(kernel.double(), torch.tensor(-power))
    for image_size in (None, (5, 5), (40, 40)):
        arguments = {"image_size": image_size, "padding": 1, "padding_mode": "circular"}
        bound, expected = kernel_norm_bound(kernel, **arguments), kernel_norm_bound(scaled, **arguments)
        assert math.ldexp(bound, -power) == pytest.approx(expected, rel=1e-3 if power == -1060 else 1e-14)


def test_large_and_zero_kernels():
    assert kernel_norm_bound(torch.full((2, 2, 3), 1e308, dtype=torch.float64)) == math.inf
    for empty in (torch.zeros(2, 3, 3, 3), torch.zeros(0, 3, 3), torch.zeros(3, 0, 3)):
        assert kernel_norm_bound(empty) == 0
        assert absolute_kernel_norm_bound(empty) == 0


def test_windows_that_read_only_padding():
    kernel = torch.zeros(2, 2, 3, dtype=torch.float64)
    for small, large in ((2.0**-10, 1e6), (2.0**-1000, 1e300)):
        kernel[..., 1] = small  # the centre, which alone meets an image of one pixel
        kernel[..., ::2] = large
        bound = kernel_norm_bound(kernel, 1, padding=1)
        assert 2 * small <= bound
        assert bound <= 2 * small * (1 + 1e-8) or large == 1e300  # where the centre underflows beside the others
    assert kernel_norm_bound(kernel, 1, padding=[(3, 0)], stride=9) == 0


def test_groups_take_the_largest_and_not_the_product():
    kernel = torch.cat((gaussian((2, 3, 3), seed=0), 5 * gaussian((2, 3, 3), seed=1)))
    alone = max(kernel_norm_bound(part, 8, padding=1) for part in kernel.chunk(2))
    assert kernel_norm_bound(kernel, 8, padding=1, groups=2) == pytest.approx(alone, rel=1e-9)


def test_a_lying_solver_and_wrong_angles_do_not_go_unnoticed(monkeypatch):
    kernel = gaussian((4, 4, 3, 3), seed=0)
    arguments = {"padding": 1, "padding_mode": "circular"}
    truth = float(circular_singular_values(kernel, (6, 6), (1, 1), (1, 1))[0])
    solve = torch.linalg.eigvalsh
    for factor in (0.0, 0.5, 1 - 1e-4, 3.0, math.nan):
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix, factor=factor: factor * solve(matrix))
        assert truth * (1 - 1e-13) <= kernel_norm_bound(kernel, (6, 6), **arguments) <= 1.5 * 3 * truth
    monkeypatch.setattr(torch.linalg, "eigvalsh", solve)
    half = _kernel_gram.half_of
    monkeypatch.setattr(_kernel_gram, "half_of", lambda circle, device: half(circle, device)[:3])
    assert kernel_norm_bound(kernel, (6, 6), **arguments) < truth  # frequencies left out: this test can fail


def test_every_pair_of_frequencies_is_met_once():
    for circle in ([5], [4, 6], [3, 2, 4], [1, 7]):
        half = _kernel_gram.half_of(circle, torch.device("cpu"))
        met = {tuple(a) for a in half.tolist()}
        mirrored = {tuple(-a % n for a, n in zip(frequency, circle, strict=True)) for frequency in met}
        assert len(met) == len(half)
        assert met | mirrored == set(product(*map(range, circle)))
        assert all(a in met or a in mirrored for a in met & mirrored)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, "groups=2 must divide the kernel's 3 channels"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of zeros, circular, reflect, replicate, got 'mirror'"),
        ({"padding_mode": "reflect", "transposed": True}, "must be one of zeros, circular, got 'reflect'"),
        ({"padding": "full"}, "padding must be 'same', 'valid', integers or pairs of them, got 'full'"),
        ({"padding": -1}, "padding must be at least 0"),
        ({"padding": [(1, 1)]}, "padding must have 2 entries"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"image_size": (2, 8)}, "an image side of 2 .axis 0. .* holds 0 windows of length 3"),
        ({"image_size": (3, 3), "padding": 4, "padding_mode": "circular"}, "must be at most 3"),
        ({"image_size": (3, 3), "padding": 3, "padding_mode": "reflect"}, "must be at most 2"),
        ({"image_size": (3, 3, 3)}, "image_size must have 2 entries"),
        ({"output_padding": 1}, "belongs to transposed convolutions"),
        ({"image_size": (1, 1), "transposed": True, "padding": 2}, "an image side of -1"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_norm_bound(torch.ones(3, 2, 3, 3), **arguments)


def test_kernels_it_refuses():
    with pytest.raises(ValueError, match="in 1 to 3 dimensions, got"):
        kernel_norm_bound(torch.ones(3, 2))
    with pytest.raises(ValueError, match="sides of at least 1"):
        kernel_norm_bound(torch.ones(3, 2, 0))
    with pytest.raises(TypeError, match="complex"):
        kernel_norm_bound(torch.ones(3, 2, 3, dtype=torch.complex64))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        kernel_norm_bound(torch.full((3, 2, 3), math.nan))
    with pytest.raises(TypeError, match="groups must be an integer"):
        kernel_norm_bound(torch.ones(3, 2, 3), groups=1.0)


def test_gradients_and_inputs_are_left_alone():
    layer = nn.Conv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    assert isinstance(kernel_norm_bound(layer.weight, (9, 9)), float)
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
