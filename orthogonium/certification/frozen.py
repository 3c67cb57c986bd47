"""Copies of modules whose weights are plain float64 tensors."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.certification.rules.registry import plain_type


def frozen(module: nn.Module, path: str, device: str = "cpu") -> nn.Module:
    """A copy that shares no memory with ``module``; parametrized weights are read once, and converted exactly.

    Raises:
        ValueError: a parameter or buffer is complex, not finite, or without values.
        TypeError: one is of a subclass of tensors.
    """
    kind = plain_type(module)
    copy = kind.__new__(kind)
    copy.__dict__ = dict(module.__dict__)
    copy.__dict__.update(_parameters={}, _buffers={}, _modules={})
    if getattr(copy, "inplace", False):
        copy.inplace = False  # type: ignore[assignment]
    names = [*module._parameters, *(module.parametrizations if is_parametrized(module) else ())]  # type: ignore[misc]
    for name in dict.fromkeys([*names, *module._buffers]):
        value = getattr(module, name)
        copy._buffers[name] = None if value is None else frozen_tensor(value, f"{path}.{name}", kind.__name__, device)
    for name, child in module._modules.items():
        if child is not None and name != "parametrizations":
            copy._modules[name] = frozen(child, f"{path}.{name}", device)
    return copy


def frozen_tensor(value: Tensor, path: str, kind: str, device: str = "cpu") -> Tensor:
    """``value`` in float64 if it is a floating-point number, checked and copied."""
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{path} ({kind}) is a {type(value).__name__}, which may compute anything. Use plain tensors")
    if value.is_complex():
        raise ValueError(f"{path} ({kind}) is complex; bounds and certificates are for real networks")
    if value.is_meta and device != "meta":
        raise ValueError(f"{path} ({kind}) is on the meta device, without values. Materialise the model first")
    if value.is_floating_point():
        if not value.is_meta and not torch.isfinite(value).all():
            raise ValueError(f"{path} ({kind}) holds NaN or infinite entries: nothing can be certified")
        return (
            torch.empty_like(value, dtype=torch.float64, device="meta")
            if device == "meta"
            else (value.detach().to("cpu", torch.float64, copy=True))
        )
    return value.detach().to(device, copy=True)
