"""Are the norm bounds bounds, how tight are they, and what do they cost?

    python benchmarks/norm_bounds.py --matrices 10000 --convolutions 5000

Random matrices (1 to 200 a side, condition up to 1e8, scales 1e-30 to 1e30, four types) and random convolutions over
every argument, against the float64 singular values of the matrix, or of the operator written out from torch's response
to impulses. A bound counts as *below* if it is smaller than that value less what LAPACK may have rounded; it must never
be. Ratios to that value are printed less one. ``--out`` writes one row per class. Times are process time on one thread,
medians.
"""

import argparse
import csv
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orthogonium.linalg import kernel_bound, kernel_norm_bound, power_iteration, spectral_norm_bound
from orthogonium.linalg.kernel_spectrum import circular_singular_values

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SIDES = {1: 24, 2: 8, 3: 4}  # largest image sides, so that the operator can be written out

Results = dict[tuple[str, ...], list[tuple[float, bool]]]


def norm_of(matrix: Tensor) -> tuple[float, float]:
    """The largest singular value and its own error; the scaling by a power of two is exact."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0.0:
        return 0.0, 0.0
    exponent = math.frexp(largest)[1]
    scaled = torch.ldexp(matrix, torch.tensor(-exponent, device=matrix.device))
    value = math.ldexp(float(torch.linalg.svdvals(scaled)[0]), exponent)
    return value, 4 * max(matrix.shape) * 2.0**-52 * value


def note(results: Results, key: tuple[str, ...], bound: float, truth: float, error: float) -> None:
    ratio = bound / truth if truth > 0 else math.nan  # an operator none of whose windows reads the image
    results[key].append((ratio, bound < truth - error))


def random_matrix(rng: random.Random) -> tuple[str, Tensor]:
    m, n = rng.randint(1, 200), rng.randint(1, 200)
    kind = rng.choice(["gaussian", "condition to 1e8", "near orthogonal", "low rank", "heavy tails", "positive"])
    matrix = torch.randn(m, n, dtype=torch.float64)
    if kind in ("condition to 1e8", "near orthogonal"):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        decades = rng.uniform(0, 8)
        values = 10 ** -(decades * torch.rand(len(s), dtype=torch.float64))
        matrix = (u * (values if kind == "condition to 1e8" else 1 + 1e-3 * torch.randn_like(s))) @ vh
    elif kind == "low rank":
        rank = rng.randint(1, max(1, min(m, n) // 10))
        matrix = torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    elif kind == "heavy tails":
        matrix = matrix * torch.exp(4 * torch.randn(m, n, dtype=torch.float64))
    elif kind == "positive":
        matrix = matrix.abs()
    return kind, matrix


def verify_matrices(count: int, seed: int) -> Results:
    results: Results = defaultdict(list)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        kind, exact = random_matrix(rng)
        name = rng.choice(list(DTYPES))
        decades = (-2.0, 2.0) if name == "float16" else (-30.0, 30.0)
        matrix = (exact / exact.abs().max() * 10 ** rng.uniform(*decades)).to(DTYPES[name])
        truth, error = norm_of(matrix.double())
        bound = float(spectral_norm_bound(matrix))
        note(results, ("matrix, tight", kind), bound, truth, error)
        note(results, ("matrix, tight", name), bound, truth, error)
        note(results, ("matrix, cheap", kind), float(spectral_norm_bound(matrix, "cheap")), truth, error)
        if name == "float32":
            note(
                results,
                ("estimate", "matrix_norm in float32"),
                float(torch.linalg.matrix_norm(matrix, 2)),
                truth,
                error,
            )
            start = torch.randn(matrix.shape[0], dtype=matrix.dtype)
            scale = float(matrix.abs().max())  # power iteration does not scale
            found = float(power_iteration(matrix / scale, start, steps=20)[0]) * scale
            note(results, ("estimate", "power iteration, 20 steps"), found, truth, error)
    return results


def random_convolution(rng: random.Random) -> tuple[Tensor, dict[str, Any], list[tuple[int, int]]]:
    while True:
        dims = rng.choice([1, 2, 2, 2, 3])
        transposed = rng.random() < 0.3
        groups = rng.choice([1, 1, 2, 3])
        largest = 6 if dims < 3 else 2
        kernel_size = [rng.randint(1, {1: 7, 2: 5, 3: 3}[dims]) for _ in range(dims)]
        stride, dilation = [rng.randint(1, 3) for _ in range(dims)], [rng.choice([1, 1, 2, 3]) for _ in range(dims)]
        modes = ["zeros", "circular"] if transposed else ["zeros", "circular", "reflect", "replicate"]
        mode = rng.choice(modes)
        extents = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        padding: Any = rng.choice(["same", "valid", "ints", "pairs"])
        if padding == "same":
            totals = [max(0, e - s) for e, s in zip(extents, stride, strict=True)]
            pads = [(total // 2, total - total // 2) for total in totals]
        elif padding == "valid":
            pads = [(0, 0)] * dims
        else:
            pads = [(rng.randint(0, 3), rng.randint(0, 3)) for _ in range(dims)]
            pads = [(p, p) for p, _ in pads] if padding == "ints" else pads
            padding = [p for p, _ in pads] if padding == "ints" else pads
        image = [rng.randint(1, SIDES[dims]) for _ in range(dims)]
        more, sides = [0] * dims, image
        if transposed:
            image = [max(1, n // 2) for n in image]
            more = [rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
            terms = zip(image, stride, extents, more, pads, strict=True)
            sides = [(w - 1) * s + e + extra - sum(pad) for w, s, e, extra, pad in terms]
        elif any(n + sum(pad) < e for n, pad, e in zip(sides, pads, extents, strict=True)):
            continue
        room = {"circular": 0, "reflect": -1}.get(mode, 99)
        if min(sides) < 1 or any(max(pad) > n + room for pad, n in zip(pads, sides, strict=True)):
            continue
        kernel = torch.randn(groups * rng.randint(1, largest), rng.randint(1, largest), *kernel_size)
        kernel = (kernel + rng.choice([0, 0, 0, 1, 3])) * 10 ** rng.uniform(-30, 30)
        arguments = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": mode,
            "transposed": transposed,
            "output_padding": more,
        }
        return kernel.to(rng.choice([torch.float32, torch.float64])), arguments | {"image_size": image}, pads


def written_out(kernel: Tensor, arguments: dict[str, Any], pads: list[tuple[int, int]]) -> Tensor:
    """The operator's matrix, from torch's response to every impulse, in float64."""
    kernel, dims, groups = kernel.double(), kernel.ndim - 2, arguments["groups"]
    stride, dilation, mode = arguments["stride"], arguments["dilation"], arguments["padding_mode"]
    shape = (kernel.shape[0] if arguments["transposed"] else kernel.shape[1] * groups, *arguments["image_size"])
    images = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    if not arguments["transposed"]:
        around = [p for pair in reversed(pads) for p in pair]
        images = F.pad(images, around, mode="constant" if mode == "zeros" else mode) if any(around) else images
        return CONVOLUTIONS[dims](images, kernel, None, stride, 0, dilation, groups).flatten(1).T
    wide = TRANSPOSED[dims](images, kernel, None, stride, 0, arguments["output_padding"], groups, dilation)
    for axis, (before, after) in enumerate(pads):
        side = wide.shape[2 + axis] - before - after
        core = wide.narrow(2 + axis, before, side).clone()
        if mode == "circular":
            core.narrow(2 + axis, side - before, before).add_(wide.narrow(2 + axis, 0, before))
            core.narrow(2 + axis, 0, after).add_(wide.narrow(2 + axis, before + side, after))
        wide = core
    return wide.flatten(1).T


def verify_convolutions(count: int, seed: int) -> Results:
    results: Results = defaultdict(list)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    written = kernel_bound._WRITTEN_OUT
    for _ in range(count):
        kernel, arguments, pads = random_convolution(rng)
        truth, error = norm_of(written_out(kernel, arguments, pads))
        mode = arguments["padding_mode"] + (", transposed" if arguments["transposed"] else "")
        note(results, ("convolution, size known", mode), kernel_norm_bound(kernel, **arguments), truth, error)
        kernel_bound._WRITTEN_OUT = 0  # as for large images
        note(results, ("convolution, on a circle", mode), kernel_norm_bound(kernel, **arguments), truth, error)
        kernel_bound._WRITTEN_OUT = written
        anywhere = kernel_norm_bound(kernel, **(arguments | {"image_size": None}))
        note(results, ("convolution, any size", mode), anywhere, truth, error)
    return results


def verify_circular(count: int, seed: int) -> Results:
    """Circular convolutions on images that the stride divides, with more channels, against their exact spectrum."""
    results: Results = defaultdict(list)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        dims = rng.choice([1, 2, 2, 3])
        groups, stride = rng.choice([1, 1, 2, 4]), [rng.randint(1, 3) for _ in range(dims)]
        channels = [rng.randint(1, 16 if dims < 3 else 4) for _ in range(2)]
        kernel_size = [rng.randint(1, 6 if dims < 3 else 3) for _ in range(dims)]
        dilation = [rng.choice([1, 1, 2]) for _ in range(dims)]
        counts = [rng.randint(2, {1: 64, 2: 16, 3: 5}[dims]) for _ in range(dims)]
        sides = [n * s for n, s in zip(counts, stride, strict=True)]
        extents = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        if any(e - s > 2 * n for e, s, n in zip(extents, stride, sides, strict=True)):
            continue
        kernel = torch.randn(channels[0] * groups, channels[1], *kernel_size) + rng.choice([0.0, 0.0, 1.0])
        values = circular_singular_values(kernel, sides, stride, dilation, groups)
        truth = float(values[0])
        error = 2.0**-44 * truth * math.sqrt(kernel.numel())  # of the transform and of the singular values
        shared = {"stride": stride, "padding": "same", "dilation": dilation, "groups": groups}
        found = kernel_norm_bound(kernel, sides, padding_mode="circular", **shared)
        note(results, ("convolution, circular and tiled", f"{dims}d"), found, truth, error)
    return results


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return median(times)


def costs() -> list[list[str]]:
    rows = []
    for n in (128, 256, 512, 1024):
        matrix = torch.randn(n, n, dtype=torch.float64)
        pair = seconds(lambda matrix=matrix: (matrix @ matrix.mT) @ matrix)
        for mode in ("cheap", "tight"):
            taken = seconds(lambda matrix=matrix, mode=mode: spectral_norm_bound(matrix, mode))
            rows.append([f"{n}x{n}, {mode}", f"{taken * 1e3:.1f} ms", f"{taken / pair:.1f} pairs of products"])
    kernel = torch.randn(64, 64, 3, 3)
    for name, size, mode in (
        ("64 to 64, 3x3, circular 32x32", (32, 32), "circular"),
        ("64 to 64, 3x3, zeros 32x32", (32, 32), "zeros"),
        ("64 to 64, 3x3, any size", None, "zeros"),
    ):
        taken = seconds(lambda size=size, mode=mode: kernel_norm_bound(kernel, size, padding=1, padding_mode=mode))
        side = 32 if mode == "circular" else 128
        truth = float(circular_singular_values(kernel, (side, side), (1, 1), (1, 1))[0])
        bound = kernel_norm_bound(kernel, size, padding=1, padding_mode=mode)
        rows.append([name, f"{taken * 1e3:.0f} ms", f"{bound / truth:.5f} of the circular norm at {side}x{side}"])
    return rows


# (in, out, kernel, stride, side) of the convolutions of a ResNet-18, with how many of each
RESNET = [
    (1, 3, 64, 7, 2, 224),
    (4, 64, 64, 3, 1, 56),
    (1, 64, 128, 3, 2, 56),
    (1, 64, 128, 1, 2, 56),
    (3, 128, 128, 3, 1, 28),
    (1, 128, 256, 3, 2, 28),
    (1, 128, 256, 1, 2, 28),
    (3, 256, 256, 3, 1, 14),
    (1, 256, 512, 3, 2, 14),
    (1, 256, 512, 1, 2, 14),
    (3, 512, 512, 3, 1, 7),
]


def resnet_cost() -> list[str]:
    total = 0.0
    for copies, inner, outer, k, s, side in RESNET:
        kernel = torch.randn(outer, inner, k, k) * (inner * k * k) ** -0.5
        start = time.process_time()
        kernel_norm_bound(kernel, (side, side), stride=s, padding=k // 2)
        total += copies * (time.process_time() - start)
    return ["the 20 convolutions of a ResNet-18", f"{total:.1f} s", "each layer timed once"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--matrices", type=int, default=1000)
    parser.add_argument("--convolutions", type=int, default=500)
    parser.add_argument("--circular", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: Results = {}
    results |= verify_matrices(arguments.matrices, arguments.seed)
    results |= verify_convolutions(arguments.convolutions, arguments.seed)
    results |= verify_circular(arguments.circular, arguments.seed)
    header = ["what", "class", "cases", "below", "median - 1", "max - 1"]
    rows = []
    for (what, kind), cases in sorted(results.items()):
        ratios = sorted(ratio - 1 for ratio, _ in cases if not math.isnan(ratio))
        below = sum(below for _, below in cases)
        rows.append([what, kind, len(cases), below, f"{median(ratios):+.1e}", f"{ratios[-1]:+.1e}"])
    for row in [header, *rows]:
        print("{:34} {:28} {:>7} {:>7} {:>14} {:>14}".format(*map(str, row)), flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    if arguments.costs:
        for row in [*costs(), resnet_cost()]:
            print("{:40} {:>10}   {}".format(*row), flush=True)


if __name__ == "__main__":
    main()
