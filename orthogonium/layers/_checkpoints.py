"""Checkpoints of unconstrained modules and of other presets, rewritten as they are loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.linalg import NonFiniteError
from orthogonium.parametrizations import Constraint, checkpoint_code, source_of


class Translation:
    """Before loading: rewrite the entries of another preset, or of an unconstrained module, as this preset's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        assign = metadata.get("assign_to_params_buffers", False)  # then torch keeps the checkpoint's dtype and device
        errors: list[str] = rest[-1]
        plain, inside = f"{prefix}{self.name}", f"{prefix}parametrizations.{self.name}."
        if not is_parametrized(module, self.name):
            return  # the constraint has been removed
        parametrization: Any = module.parametrizations[self.name]  # type: ignore[index]
        constraint: Constraint = parametrization[0]
        free = [name for name, _ in parametrization.named_parameters(recurse=False)]
        free += [name for name, _ in parametrization.named_buffers(recurse=False)]
        first = getattr(parametrization, free[0])
        matrix_key, extra = f"{inside}{free[0]}", f"{inside}0._extra_state"
        _check_finite(constraint.label, state, plain, constraint._weight_shape(first))
        for name in free:
            _check_finite(constraint.label, state, f"{inside}{name}", tuple(getattr(parametrization, name).shape))
        if plain in state and matrix_key not in state:
            shape = constraint._weight_shape(first)  # without the weight, which uninitialised memory may not have
            if not isinstance(state[plain], Tensor):
                return  # torch reports it
            if tuple(state[plain].shape) != shape:
                errors.append(_other_shape(plain, state.pop(plain), shape))
                state.update({f"{inside}{name}": getattr(parametrization, name) for name in free})
                self._complete(state, f"{inside}0.", constraint)
                return
            value = state.pop(plain)
            if assign:
                constraint.to(value.dtype)
            found = constraint.right_inverse(value if assign else value.to(first))
            for name, tensor in zip(free, found if isinstance(found, tuple) else (found,), strict=True):
                state[f"{inside}{name}"] = tensor
        elif matrix_key in state and extra in state and state[matrix_key].shape == first.shape:
            code = round(float(state[extra]))
            source = source_of(code, state[matrix_key])
            if source is None:
                return
            if code == checkpoint_code(constraint.orthogonalizer):
                self._complete(state, f"{inside}0.", constraint, state[matrix_key])
                return
            base = next((state[key] for key in state if key.startswith(f"{inside}0.") and key.endswith(".base")), None)
            if base is not None:
                source.load_state_dict({"base": base})
            with torch.no_grad():
                matrix = source(state[matrix_key])
            if assign:
                constraint.to(matrix.dtype)
            state[matrix_key] = constraint.matrix_right_inverse(matrix if assign else matrix.to(first))
        else:
            return
        for key in [key for key in state if key.startswith(f"{inside}0.")]:
            del state[key]
        self._complete(state, f"{inside}0.", constraint, state[matrix_key])

    @staticmethod
    def _complete(state: dict[str, Any], inside: str, constraint: Constraint, matrix: Tensor | None = None) -> None:
        """Leave out what this preset has no buffer for, and keep its own buffer where the checkpoint has none."""
        own = constraint.state_dict()
        for key in [key for key in state if key.startswith(inside) and key.removeprefix(inside) not in own]:
            del state[key]
        for key, value in own.items():
            if value.is_meta and matrix is not None and not matrix.is_meta:
                value = torch.zeros_like(value, device=matrix.device)  # an estimate, which starts anew
            state.setdefault(f"{inside}{key}", value)


def _other_shape(key: str, value: Tensor, shape: tuple[int, ...]) -> str:
    """In torch's words."""
    return (
        f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in current "
        f"model is {torch.Size(shape)}."
    )


def _check_finite(label: str, state: dict[str, Any], key: str, shape: tuple[int, ...]) -> None:
    """Raise before anything is copied; torch reports other shapes, whose entries are not touched.

    Raises:
        NonFiniteError: the entry holds NaN or Inf.
    """
    value = state.get(key)
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return
    if tuple(value.shape) != shape or value.is_meta:
        return
    bad = value.numel() - int(value.isfinite().sum())
    if bad:
        raise NonFiniteError(
            f"{label} cannot be loaded: the checkpoint holds NaN or Inf in {bad} of {value.numel()} entries of {key}. "
            "The run that wrote it had diverged, or the file is damaged; load an earlier one. This module is unchanged."
        )
