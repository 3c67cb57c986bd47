"""Small constant matrices, made once: for a 64 × 64 matrix the call that makes one costs as much as a product."""

from functools import lru_cache

import torch
from torch import Tensor

_LARGEST = 128  # sides; beyond it making one is cheap beside the rest, and keeping it is not
_KEPT = 64  # matrices, of at most 128 KiB each


def identity(side: int, like: Tensor) -> Tensor:
    """``I``, of the dtype and device of ``like``. Not to be written into."""
    return (_kept_identity if side <= _LARGEST else _identity)(side, like.dtype, like.device)


def half_lower(side: int, like: Tensor) -> Tensor | None:
    """Ones below the diagonal, ``½`` on it, zeros above; nothing for large sides. Not to be written into."""
    return _kept_half_lower(side, like.dtype, like.device) if side <= _LARGEST else None


def _identity(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept has to serve everybody
        return torch.eye(side, dtype=dtype, device=device)


_kept_identity = lru_cache(_KEPT)(_identity)


@lru_cache(_KEPT)
def _kept_half_lower(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _identity(side, dtype, device).mul_(-0.5).add_(torch.ones(side, side, dtype=dtype, device=device).tril_())
