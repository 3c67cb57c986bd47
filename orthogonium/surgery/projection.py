"""Every weight of a model becomes its nearest orthogonal matrix, in place."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orthogonium._reports import aligned
from orthogonium._selection import Selection, included
from orthogonium.linalg import NonFiniteError, polar_after_step
from orthogonium.linalg._precision import working_dtype
from orthogonium.parametrizations.kernel_projection import nearest_kernel
from orthogonium.surgery._projectable import ConvRule, ProjectableWeight, find_projectable

_STACK = 2**24  # entries that are projected in one call


@dataclass(frozen=True)
class ProjectionReport:
    """What :func:`orthogonalize_model` did; prints as a table.

    Attributes:
        drift: for each projected weight, how far it was: the Frobenius norm of its change over that of the result.
        left: for each weight that was left alone, why.
    """

    drift: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("weight", "drift")]
        rows += [(name, f"{drift:.3g}") for name, drift in self.drift.items()]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        return aligned(rows)


def orthogonalize_model(
    model: nn.Module,
    include: Selection | None = None,
    exclude: Selection | None = None,
    *,
    conv: ConvRule = "kernel",
    frozen: bool = False,
) -> ProjectionReport:
    """Replace every weight, in place, by the orthogonal one nearest to it.

    - Linear layers: the polar factor, with orthonormal rows or columns, whichever are fewer.
    - Recurrent layers and cells: each gate on its own, input-to-hidden and hidden-to-hidden. One projection of the
      stacked gates would shrink each of them, and with them what a state remembers.
    - Attention: queries, keys and values head by head, and the output projection.
    - Convolutions, transposed ones too, by ``conv``.
    - Embeddings, norms, biases and constrained weights of this library are left alone; so are frozen weights, weights
      tied to an embedding, and kernels whose shape and stride no orthogonal one has. The report says so.

    Nothing is recorded by autograd. Weights of one shape are projected in one batched call, tied weights once. Half
    precision is computed in float32 and rounded once. A weight under another parametrization is assigned through it,
    which sets its free tensors; where that does not give an orthogonal weight, it is put back. Either all weights are
    projected or, when one holds NaN or Inf, none.

    Args:
        model: changed in place.
        include: what to project: name patterns in the manner of a shell (``"encoder.*"``), matched against the full
            name of a weight (``"encoder.rnn.weight_hh_l0"``) and that of its module, or a function of full name and
            module. Everything by default.
        exclude: what not to, in the same way.
        conv: ``"kernel"``: the nearest convolution that :class:`~orthogonium.layers.OrthoConv2d` can be: with
            circular padding that tiles the image all singular values of the operator become one, with zeros none is
            larger. ``"delta"``: the nearest that is orthogonal at the centre tap and zero elsewhere. ``"reshape"``: the
            kernel as a matrix ``(out, in · Πk)``, which is *not* orthogonal as an operator: its norm is up to ``√Πk``.
        frozen: also weights that do not require a gradient.

    Returns:
        The drift of each weight and the reasons for those left alone.

    Raises:
        ValueError: a weight on the meta device, of a lazy module that has not run, or with NaN or Inf
            (:class:`~orthogonium.linalg.NonFiniteError`); patterns in ``include`` that match nothing; ``conv`` unknown.
    """
    sites, left = find_projectable(model, included(include, exclude, by_owner=True), conv, frozen)
    if include is not None and not sites and not left:
        raise ValueError(f"include={include!r} matches no weight of {type(model).__name__}")
    with torch.no_grad():
        moved = project(sites)
        drift: dict[str, float] = {}
        for site, distance in zip(sites, moved, strict=True):
            if distance is None:
                left[site.path] = "its parametrization does not give back the weight that it is set to"
            else:
                drift[site.path] = float(distance)
    return ProjectionReport(drift, left)


class Frames:
    """Projectors found for kernels in the last call: the next one starts from them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}


def project(sites: Sequence[ProjectableWeight], frames: Frames | None = None) -> list[Tensor | None]:
    """Project the weights; returns how far each moved, ``None`` for one that a parametrization would not take."""
    weights = [site.read() for site in sites]
    results: list[Tensor | None] = [None] * len(sites)
    for members, compute in _batches(sites, weights, frames):
        try:
            found = compute()
        except NonFiniteError:
            bad = [sites[i].path for i in members if not bool(torch.isfinite(weights[i]).all())]
            raise NonFiniteError(
                f"{', '.join(bad)}: NaN or Inf. Nothing has been projected. Lower the learning rate, clip gradients, "
                "or reload the last good checkpoint."
            ) from None
        for i, projected in zip(members, found, strict=True):
            results[i] = projected
    moved: list[Tensor | None] = []
    for site, weight, result in zip(sites, weights, results, strict=True):
        assert result is not None
        work = working_dtype(weight.dtype)
        change = torch.linalg.vector_norm(weight.to(work) - result.to(work))
        distance = change / torch.linalg.vector_norm(result.to(work))
        moved.append(distance if _write(site, result) else None)
    return moved


def _write(site: ProjectableWeight, value: Tensor) -> bool:
    if not site.parametrized:
        getattr(site.module, site.name).copy_(value)
        return True
    if _reads_back(site, value):
        return True
    hooks = site.list_of_hooks()
    before = {name: tensor.clone() for name, tensor in hooks.state_dict().items()}
    try:
        setattr(site.module, site.name, value)
        if _reads_back(site, value):
            return True
        getattr(site.module, site.name)  # hooks with a running estimate, such as spectral_norm, settle in one reading
        if _reads_back(site, value):
            return True
    except (NotImplementedError, RuntimeError, ValueError):
        pass
    hooks.load_state_dict(before)
    return False


def _reads_back(site: ProjectableWeight, value: Tensor) -> bool:
    eps = torch.finfo(value.dtype).eps
    error = torch.linalg.vector_norm((site.read() - value).double())
    return bool(error <= 32 * eps * torch.linalg.vector_norm(value.double()))


Batch = tuple[list[int], Callable[[], list[Tensor]]]


def _batches(sites: Sequence[ProjectableWeight], weights: Sequence[Tensor], frames: Frames | None) -> Iterator[Batch]:
    """Indices of weights that one call serves, and the call."""
    matrices: dict[tuple[object, ...], list[int]] = defaultdict(list)
    kernels: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (site, weight) in enumerate(zip(sites, weights, strict=True)):
        where = (weight.dtype, weight.device)
        if site.kind == "kernel":
            kernels[(site.plan, *where)].append(i)
        else:
            matrices[(tuple(_as_matrices(site, weight).shape[1:]), *where)].append(i)
    for members in matrices.values():
        for part in _split(members, weights):
            yield part, lambda part=part: _nearest_matrices([sites[i] for i in part], [weights[i] for i in part])  # type: ignore[misc]
    for members in kernels.values():
        for part in _split(members, weights):
            yield (
                part,
                lambda part=part: _nearest_kernels(  # type: ignore[misc]
                    [sites[i] for i in part], [weights[i] for i in part], frames
                ),
            )


def _split(members: list[int], weights: Sequence[Tensor]) -> Iterator[list[int]]:
    count = max(1, _STACK // weights[members[0]].numel())
    for first in range(0, len(members), count):
        yield members[first : first + count]


def _as_matrices(site: ProjectableWeight, weight: Tensor) -> Tensor:
    """``(blocks, m, n)``."""
    if site.kind == "delta":
        weight = weight[_centre(weight)]
    return weight.flatten(1).unflatten(0, (site.blocks, -1))


def _centre(weight: Tensor) -> tuple[slice | int, ...]:
    return (slice(None), slice(None), *((k - 1) // 2 for k in weight.shape[2:]))


def _nearest_matrices(sites: Sequence[ProjectableWeight], weights: Sequence[Tensor]) -> list[Tensor]:
    stacks = [_as_matrices(site, weight) for site, weight in zip(sites, weights, strict=True)]
    found = polar_after_step(torch.cat(stacks) if len(stacks) > 1 else stacks[0]).split(
        [len(stack) for stack in stacks]
    )
    results = []
    for site, weight, matrices in zip(sites, weights, found, strict=True):
        if site.kind == "delta":
            result = torch.zeros_like(weight)
            result[_centre(weight)] = matrices.flatten(0, 1)
            results.append(result)
        else:
            results.append(matrices.reshape(weight.shape))
    return results


def _nearest_kernels(
    sites: Sequence[ProjectableWeight], weights: Sequence[Tensor], frames: Frames | None
) -> list[Tensor]:
    """Kernels of one plan are the groups of one larger plan."""
    plan = sites[0].plan
    assert plan is not None
    joint = type(plan)(plan.out_channels, plan.in_channels, plan.kernel_size, plan.stride, plan.groups * len(sites))
    stack = torch.cat(list(weights))
    if not bool(torch.isfinite(stack).all()):
        raise NonFiniteError("a kernel holds NaN or Inf")
    start = None
    if frames is not None and all(site.path in frames.kept for site in sites):
        start = torch.cat([frames.kept[site.path] for site in sites], 1).to(stack.device)
    kernel, found = nearest_kernel(joint, stack, start)
    if frames is not None and found is not None:
        frames.kept.update({s.path: f for s, f in zip(sites, found.split(plan.groups, 1), strict=True)})
    return list(kernel.split(weights[0].shape[0]))
