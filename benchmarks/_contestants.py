"""Everything that makes an orthogonal matrix, behind one interface; served to another process line by line.

`python benchmarks/_contestants.py LIBRARY` reads one JSON request a line and answers with one. A process of its own
lets two libraries that share an import name run in one benchmark.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Weight = Callable[[], Tensor]


@cache
def start_matrix(shape: tuple[int, ...], start: str, seed: int = 0) -> Tensor:
    """``near`` (singular values within 2 % of one), ``kappa-K`` (log-spaced down to 1/K), or ``gaussian``.

    In float64, to be copied.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(shape, generator=generator, dtype=torch.float64)
    if start == "gaussian":
        return draw / math.sqrt(max(shape[-2:]))
    u, _, vh = torch.linalg.svd(draw, full_matrices=False)
    count = min(shape[-2:])
    if start == "near":
        values = torch.linspace(1.02, 0.98, count, dtype=torch.float64)
    else:
        values = torch.logspace(0, -math.log10(float(start.removeprefix("kappa-"))), count, dtype=torch.float64)
    return (u * values[..., None, :]) @ vh


class Hooked(nn.Module):
    """A bare weight for libraries that register on a module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def contestant(library: str, method: str, free: Tensor) -> tuple[Weight, Tensor]:
    """``(weight, leaf)``: call the first for a fresh weight in training mode; the second is what gradients go to."""
    shape = tuple(free.shape)
    if library in ("ours", "peer"):
        import orthogonium.reparametrizers as front

        params = getattr(front, f"{method}_ORTHO_PARAMS")
        leaf = free.clone().requires_grad_()
        normalizer = params.spectral_normalizer(weight_shape=shape).to(free)
        orthogonalizer = params.orthogonalizer(weight_shape=shape).to(free)
        if library == "ours":
            from orthogonium.parametrizations import Constraint

            constraint = Constraint(normalizer, orthogonalizer)
            return lambda: constraint.compute(leaf), leaf  # the hooks, as for the peer
        return lambda: orthogonalizer(normalizer(leaf)), leaf
    if library == "torch":
        leaf = free.clone().requires_grad_()
        if method == "svd":
            return lambda: _svd(leaf), leaf
        module = Hooked(torch.eye(*shape[-2:], dtype=free.dtype, device=free.device).expand(shape).clone())
        torch.nn.utils.parametrizations.orthogonal(module, orthogonal_map=method)
        with torch.no_grad():
            if method == "householder":  # its free tensor has a unit diagonal
                free = free.tril(-1) + torch.eye(*shape[-2:], dtype=free.dtype, device=free.device)
            module.parametrizations.weight.original.copy_(free)
        return lambda: module.weight, module.parametrizations.weight.original
    if library == "geotorch":
        import geotorch

        module = Hooked(start_matrix(shape, "kappa-1").to(free))
        geotorch.orthogonal(module, "weight")
        leaf = module.parametrizations.weight.original
        with torch.no_grad():
            leaf.copy_(free.reshape(leaf.shape) if leaf.numel() == free.numel() else leaf)
        return lambda: module.weight, leaf
    if library == "torchlip":
        from deel.torchlip.normalizers import bjorck_normalization, spectral_normalization

        leaf = free.clone().requires_grad_()
        u = torch.nn.functional.normalize(torch.randn(1, shape[-2], dtype=free.dtype, device=free.device))
        return lambda: bjorck_normalization(spectral_normalization(leaf, u)[0]), leaf
    raise ValueError(f"unknown library {library!r}")


def _svd(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, of the wall once a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(action: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of one call over blocks of at least two milliseconds, for about ``seconds`` in all."""
    began = clock(device)
    action()
    single = max(clock(device) - began, 1e-6)
    if single >= seconds:
        return single
    calls = max(1, int(2e-3 / single))
    samples = []
    for _ in range(max(1, min(25, int(seconds / (calls * single))))):
        began = clock(device)
        for _ in range(calls):
            action()
        samples.append((clock(device) - began) / calls)
    return median(samples)


def timed_beside(actions: Sequence[Callable[[], object]], device: str, seconds: float) -> list[float]:
    """Median seconds of one call of each, in blocks that take turns, so that a slow minute is shared by all."""
    calls = [max(1, int(2e-3 / max(timed(action, device, 0.0), 1e-6))) for action in actions]
    samples: list[list[float]] = [[] for _ in actions]
    end = clock(device) + seconds
    while len(samples[0]) < 3 or (clock(device) < end and len(samples[0]) < 50):
        for action, count, found in zip(actions, calls, samples, strict=True):
            began = clock(device)
            for _ in range(count):
                action()
            found.append((clock(device) - began) / count)
    return [median(found) for found in samples]


def saved_weights(weight: Weight, leaf: Tensor) -> float:
    """Bytes kept for the backward pass beside the leaf and the result, in units of the weight."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = weight()
    for tensor in (leaf, result):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / (leaf.numel() * leaf.element_size())


def quality(weight: Weight, leaf: Tensor, free: Tensor) -> dict[str, float]:
    """Defect, distance to the float64 polar factor and error of the gradient against the polar factor's."""
    result = weight()
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    gradient = torch.autograd.grad(result, leaf, grad, allow_unused=True)[0] if result.requires_grad else None
    exact = free.double().cpu()
    u, values, vh = torch.linalg.svd(exact, full_matrices=False)
    polar = u @ vh
    q = result.detach().double().cpu()
    short = q if q.shape[-2] <= q.shape[-1] else q.mT
    error = short @ short.mT - torch.eye(short.shape[-2], dtype=q.dtype)
    defect = torch.linalg.matrix_norm(error, 2).max()
    found = {"defect": defect.item(), "distance": ((q - polar).norm() / polar.norm()).item()}
    inner = u.mT @ grad.double().cpu() @ vh.mT
    skew = u @ ((inner - inner.mT) / (values[..., :, None] + values[..., None, :])) @ vh
    outside = grad.double().cpu()
    if free.shape[-2] <= free.shape[-1]:
        outside = (u / values[..., None, :]) @ (u.mT @ (outside - outside @ vh.mT @ vh))
    else:
        outside = ((outside - u @ (u.mT @ outside)) @ vh.mT / values[..., None, :]) @ vh
    reference = skew + outside if free.shape[-2] != free.shape[-1] else skew
    if gradient is not None and gradient.shape == reference.shape:
        found["gradient_error"] = ((gradient.double().cpu() - reference).norm() / reference.norm()).item()
    return found


def answer(library: str, request: dict[str, Any]) -> dict[str, Any]:
    """Measure one contestant on one start; ``method`` ``pair`` is the unit: two products of that shape."""
    torch.manual_seed(0)
    device, seconds, shape = request["device"], request["seconds"], tuple(request["shape"])
    dtype = getattr(torch, request["dtype"])
    free = start_matrix(shape, request["start"]).to(device=device, dtype=dtype) * request["scale"]
    if request["method"] == "pair":
        small = (lambda: (free @ free.mT) @ free) if shape[-2] <= shape[-1] else (lambda: free @ (free.mT @ free))
        small()
        small()
        return {"forward": timed(small, device, seconds / 4)}
    weight, leaf = contestant(library, request["method"], free)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(free)

    def step() -> None:
        leaf.grad = None
        weight().backward(grad)

    def forward() -> None:
        with torch.no_grad():
            weight()

    try:
        forward()
        forward()  # the first call may be slow, and would set the size of a block
        result = {"forward": timed(forward, device, seconds), "both": math.nan}
        if weight().requires_grad:
            step()
            result["both"] = timed(step, device, seconds)
        if request["quality"]:
            result |= quality(weight, leaf, free)
            result["saved"] = saved_weights(weight, leaf)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return result


def serve(library: str) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(library, json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
