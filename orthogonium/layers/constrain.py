"""Put the orthogonality constraint on a weight of any module, and keep its checkpoints interchangeable."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization

from orthogonium._checks import check_floating, check_matrix
from orthogonium.parametrizations import Constraint, FusedConstraints, checkpoint_code, source_of
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams

Module = TypeVar("Module", bound=nn.Module)


def orthogonal(module: Module, name: str = "weight", ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS) -> Module:
    """Constrain ``module.name`` to be orthogonal, in place: orthonormal rows or columns, whichever are fewer.

    The present value becomes its nearest orthogonal matrix. The free tensor that the optimiser sees is
    ``module.parametrizations.<name>.original``; reading and assigning ``module.<name>`` work as before, and so does
    ``torch.nn.utils.parametrize.remove_parametrizations``. Checkpoints of the unconstrained module load (projected),
    and so do those of other presets, keeping the weight that they stood for.

    Args:
        module: has a parameter ``name`` of shape ``(m, n)``.
        name: which.
        ortho_params: how a free matrix becomes an orthogonal one.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no such parameter, it is constrained already, it is no matrix, or holds NaN or Inf.
        TypeError: it is not real floating point, or ``ortho_params`` is no :class:`OrthoParams`.
    """
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
    if weight.ndim != 2:
        raise ValueError(
            f"{owner}.{name} must be a matrix, got shape {tuple(weight.shape)}. A reshaped convolution kernel would be "
            "orthogonal as a matrix and not as an operator."
        )
    normalizer, orthogonalizer = ortho_params.make(weight.shape)
    constrain(module, name, normalizer, orthogonalizer)
    return module


def constrain(module: nn.Module, name: str, normalizer: nn.Module, orthogonalizer: nn.Module) -> None:
    """Register one :class:`Constraint` on ``module.name`` and make its checkpoints loadable."""
    weight = getattr(module, name)
    constraint = Constraint(normalizer, orthogonalizer, label=f"{type(module).__name__}.{name}")
    constraint = constraint.to(device=weight.device, dtype=weight.dtype).train(module.training)
    register_parametrization(module, name, constraint)
    module.register_load_state_dict_pre_hook(_Translation(name))


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


class _Translation:
    """Before loading: rewrite the entries of another preset, or of an unconstrained module, as this preset's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        plain, inside = f"{prefix}{self.name}", f"{prefix}parametrizations.{self.name}."
        parametrization: Any = module.parametrizations[self.name]  # type: ignore[index]
        constraint: Constraint = parametrization[0]
        free = [name for name, _ in parametrization.named_parameters(recurse=False)]
        free += [name for name, _ in parametrization.named_buffers(recurse=False)]
        first = getattr(parametrization, free[0])
        matrix_key, extra = f"{inside}{free[0]}", f"{inside}0._extra_state"
        if plain in state and matrix_key not in state:
            shape = getattr(module, self.name).shape
            if not isinstance(state[plain], Tensor) or state[plain].shape != shape:
                return  # torch reports the shape
            found = constraint.right_inverse(state.pop(plain).to(first))
            for name, tensor in zip(free, found if isinstance(found, tuple) else (found,), strict=True):
                state[f"{inside}{name}"] = tensor
        elif matrix_key in state and extra in state and state[matrix_key].shape == first.shape:
            code = round(float(state[extra]))
            source = source_of(code, state[matrix_key])
            if source is None:
                return
            if code == checkpoint_code(constraint.orthogonalizer):
                self._complete(state, f"{inside}0.", constraint)
                return
            base = next((state[key] for key in state if key.startswith(f"{inside}0.") and key.endswith(".base")), None)
            if base is not None:
                source.load_state_dict({"base": base})
            with torch.no_grad():
                matrix = source(state[matrix_key])
            state[matrix_key] = constraint.matrix_right_inverse(matrix.to(first))
        else:
            return
        for key in [key for key in state if key.startswith(f"{inside}0.")]:
            del state[key]
        self._complete(state, f"{inside}0.", constraint)

    @staticmethod
    def _complete(state: dict[str, Any], inside: str, constraint: Constraint) -> None:
        """Leave out what this preset has no buffer for, and keep its own buffer where the checkpoint has none."""
        own = constraint.state_dict()
        for key in [key for key in state if key.startswith(inside) and key.removeprefix(inside) not in own]:
            del state[key]
        for key, value in own.items():
            state.setdefault(f"{inside}{key}", value)
