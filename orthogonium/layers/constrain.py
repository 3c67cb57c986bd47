"""Put the orthogonality constraint on a weight of any module, and keep its checkpoints interchangeable."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from orthogonium._checks import check_floating, check_matrix
from orthogonium.layers._checkpoints import Translation
from orthogonium.layers._pickling import adapt_class, make_picklable
from orthogonium.layers._targets import block_plan, geometry_of
from orthogonium.parametrizations import (
    AlmostOrthogonalKernel,
    BatchedIdentity,
    Constraint,
    FusedConstraints,
    KernelPlan,
    OrthogonalKernel,
    StackedBlocks,
)
from orthogonium.parametrizations.torch_weights import check_kernel, kernel_plan, stacked_blocks
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

Module = TypeVar("Module", bound=nn.Module)


def orthogonal(
    module: Module,
    name: str = "weight",
    ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    *,
    blocks: int | None = None,
) -> Module:
    """Constrain ``module.name`` to be orthogonal, in place: orthonormal rows or columns, whichever are fewer.

    What that means depends on the module:

    - a matrix, as in ``nn.Linear``: the nearest orthogonal matrix takes its place;
    - the kernel of ``nn.Conv1d/2d/3d`` and ``nn.ConvTranspose1d/2d/3d``: an orthogonal kernel near it does, so that the
      *operator* never grows a distance. Zero padding loses what leaves the image, nothing else; with circular padding
      and a stride the image sides are checked in each call;
    - ``weight_ih…`` and ``weight_hh…`` of recurrent modules and cells: each gate is orthogonal on its own;
    - ``in_proj_weight`` and the ``q_``, ``k_``, ``v_proj_weight`` of ``nn.MultiheadAttention``: each head is.

    The free tensor that the optimiser sees is ``module.parametrizations.<name>.original`` (``original0`` and
    ``original1`` behind kernels wider than their stride); reading and assigning ``module.<name>`` work as before, and
    so does ``torch.nn.utils.parametrize.remove_parametrizations``. One free tensor stays the :class:`Parameter` that it
    was; two are new. So constrain first, then build the optimiser. Checkpoints of the unconstrained module load
    (projected), and so do those of other presets, keeping the weight that they stood for.

    Args:
        module: has a parameter ``name``: a matrix, or the kernel of a convolution.
        name: which.
        ortho_params: how a free matrix becomes an orthogonal one.
        blocks: into how many stacked matrices the rows of a matrix fall, each orthogonal on its own, if not as said
            above.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no such parameter, it is constrained already, it is neither matrix nor kernel, or holds NaN
            or Inf; no orthogonal kernel has this shape and stride; the padding is reflect or replicate, or circular and
            so wide that windows overlap; ``blocks`` do not divide the rows.
        TypeError: it is not real floating point, or ``ortho_params`` is no :class:`OrthoParams`.
    """
    weight = _parameter_to_constrain(module, name, ortho_params)
    owner = type(module).__name__
    if isinstance(module, _ConvNd) and name == "weight":
        if blocks is not None:
            raise ValueError(f"blocks={blocks} is for matrices; the groups of a kernel are those of {owner}")
        geometry_of(module)  # raises for padding under which no kernel would do
        check_kernel(module)
        constrain_kernel(module, name, kernel_plan(module), ortho_params)
        return module
    if weight.ndim != 2:
        raise ValueError(
            f"{owner}.{name} must be a matrix or the kernel of a torch convolution, got shape {tuple(weight.shape)}. A "
            "reshaped convolution kernel would be orthogonal as a matrix and not as an operator."
        )
    given = stacked_blocks(module, name, weight.shape[0]) if blocks is None else blocks
    plan = block_plan(owner, name, weight, given)
    if plan.blocks == 1:
        normalizer, orthogonalizer = ortho_params.make(weight.shape)
    else:
        normalizer, hook = ortho_params.make(plan.matrix_shape)
        orthogonalizer = StackedBlocks(plan, hook)
    constrain(module, name, normalizer, orthogonalizer)
    return module


def _parameter_to_constrain(module: nn.Module, name: str, ortho_params: OrthoParams) -> nn.Parameter:
    if not isinstance(ortho_params, OrthoParams):
        raise TypeError(f"ortho_params must be an OrthoParams such as CHOLESKY_ORTHO_PARAMS, got {ortho_params!r}")
    owner = type(module).__name__
    if is_parametrized(module, name):
        raise ValueError(
            f"{owner}.{name} is parametrized already. Remove that first with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})."
        )
    weight = module._parameters.get(name)
    if weight is None:
        known = ", ".join(key for key, value in module._parameters.items() if value is not None)
        raise ValueError(f"{owner} has no parameter {name!r}; it has: {known or 'none'}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{owner}.{name} has no shape yet. Run one forward pass before constraining a lazy module.")
    check_matrix(f"{owner}.{name}", weight)
    check_floating(f"{owner}.{name}", weight)
    return weight


def constrain(module: nn.Module, name: str, normalizer: nn.Module, orthogonalizer: nn.Module) -> None:
    """Register one :class:`Constraint` on ``module.name`` and make its checkpoints loadable."""
    weight = getattr(module, name)
    constraint = Constraint(normalizer, orthogonalizer, label=f"{type(module).__name__}.{name}")
    constraint = constraint.to(device=weight.device, dtype=weight.dtype).train(module.training)
    register_parametrization(module, name, constraint)
    constraint.forget()  # reads it, and the free tensor may yet be filled through `.data`
    _finish(module, name)


def _finish(module: nn.Module, name: str) -> None:
    """What a module needs besides the parametrization itself."""
    module.register_load_state_dict_pre_hook(Translation(name))
    make_picklable(module)
    adapt_class(module)


def constrain_kernel(
    module: nn.Module, name: str, plan: KernelPlan, ortho_params: OrthoParams, draw: bool = False
) -> None:
    """Put an orthogonal kernel in place of ``module.name``: one near it, or a drawn one."""
    normalizer, matrix_hook = ortho_params.make(plan.matrix_shape)
    kernel = OrthogonalKernel(plan, matrix_hook)
    with kernel.drawing() if draw else nullcontext():
        constrain(module, name, normalizer, kernel)


def almost_orthogonal(module: _ConvNd) -> None:
    """Rescale the kernel of a torch convolution, channel by channel, so that the operator never grows a distance.

    For kernels of which no orthogonal one exists, or only a shift; see :class:`orthogonium.layers.AOLConv2d`.
    """
    geometry_of(module)  # raises for padding under which no kernel would do
    constrain(module, "weight", BatchedIdentity(module.weight.shape), AlmostOrthogonalKernel(module.groups))


def share_constraint(module: nn.Module, name: str, source: nn.Module, source_name: str) -> None:
    """Keep ``module.name`` tied to ``source.source_name``, which was the same parameter before it was constrained."""
    register_parametrization(module, name, nn.Identity(), unsafe=True)
    tied: Any = source.parametrizations[source_name]  # type: ignore[index]
    module.parametrizations[name] = tied  # type: ignore[index, operator]
    _finish(module, name)


def fused(model: nn.Module) -> FusedConstraints:
    """Orthogonalise all weights of ``model`` that have one shape and preset in one batched call per step.

    Values and gradients are those of the separate computation up to rounding. It pays where layers are many and small.

    Returns:
        A handle: ``.sizes`` of the groups, ``.remove()``; also a context manager.
    """
    return FusedConstraints(_constraints(model))


def _constraints(model: nn.Module) -> Iterator[tuple[nn.Module, Constraint]]:
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            hooks = list(module)
            if len(hooks) == 1 and isinstance(hooks[0], Constraint):
                yield module, hooks[0]
