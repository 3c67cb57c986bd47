"""Small constant matrices, made once: for a 64 × 64 matrix the call that makes one costs as much as a product."""

from functools import lru_cache

import torch
from torch import Tensor

_LARGEST = 128  # sides; beyond it making one is cheap beside the rest, and keeping it is not
_KEPT = 64  # matrices, of at most 128 KiB each


def identity(side: int, like: Tensor) -> Tensor:
    """``I``, of the dtype and device of ``like``. Not to be written into."""
    make = _kept_identity if side <= _LARGEST and _are_plain() else _identity
    return make(side, like.dtype, like.device)


def half_lower(side: int, like: Tensor) -> Tensor | None:
    """Ones below the diagonal, ``½`` on it, zeros above; nothing for large sides. Not to be written into."""
    if side > _LARGEST:
        return None
    return (_kept_half_lower if _are_plain() else _half_lower)(side, like.dtype, like.device)


def last_identity(count: int, side: int, like: Tensor) -> Tensor:
    """``(count, side²)``: zeros, and the identity as the last row. Not to be written into."""
    make = _kept_last_identity if side <= _LARGEST and _are_plain() else _last_identity
    return make(count, side, like.dtype, like.device)


def _are_plain() -> bool:
    """Whether tensors made now are of use later: modes and transforms put others in their place."""
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def _identity(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(side, dtype=dtype, device=device)


def _half_lower(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(side, side, dtype=dtype, device=device).tril_() - 0.5 * _identity(side, dtype, device)


def _last_identity(count: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        result = torch.zeros(count, side * side, dtype=dtype, device=device)
        result[-1, :: side + 1] = 1.0
        return result


_kept_last_identity = lru_cache(_KEPT)(_last_identity)
_kept_identity, _kept_half_lower = lru_cache(_KEPT)(_identity), lru_cache(_KEPT)(_half_lower)
