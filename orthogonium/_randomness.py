"""Random draws that leave no trace in the global random state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(seed: int | None = None) -> Iterator[None]:
    """Inside, draw from ``seed`` if one is given; after it, the CPU and every CUDA device go on as if nothing was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
