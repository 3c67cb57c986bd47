"""Products in the precision of their type, whatever the process has allowed.

``torch.set_float32_matmul_precision("high")`` and ``"medium"`` let float32 products round to the 11 bits of TF32 on a
GPU, and to the 8 bits of bfloat16 on CPUs that have them, for the speed of a network. An orthogonal weight would be off
by 1e-3 then.
"""

import threading
from contextlib import AbstractContextManager
from functools import partial

import torch

_READ = getattr(torch._C, "_get_fp32_precision_getter", None)  # from torch 2.9 on, for each backend
_WRITE = getattr(torch._C, "_set_fp32_precision_setter", None)
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}
_FULL = frozenset(("ieee", "none", "highest"))


def _read(backend: str, operation: str = "matmul") -> str:
    return str(torch.get_float32_matmul_precision() if _READ is None else _READ(backend, operation))


def _write(backend: str, value: str) -> None:
    if _WRITE is None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)
    elif value != "ieee" and value == _read(backend, "all"):
        _WRITE(backend, "matmul", "none")  # as it was: inherited
    else:
        _WRITE(backend, "matmul", value)


class FullProducts(AbstractContextManager[None]):
    """A context in which float32 products on one kind of device are not rounded to fewer bits.

    The setting is the process's: it returns when the last of all threads has left.
    """

    def __init__(self, device: str) -> None:
        self._backend = _BACKENDS[device]
        self._now = torch.get_float32_matmul_precision if _READ is None else partial(_READ, self._backend, "matmul")
        self._lock, self._inside, self._found = threading.Lock(), 0, ""

    def are_needed(self) -> bool:
        """Whether entering makes a difference, or another thread has entered and may leave first."""
        return self._now() not in _FULL or self._inside > 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1  # first, and down last: whoever finds the setting full looks whether it stays so
            if self._inside == 1:
                self._found = _read(self._backend)
                _write(self._backend, "ieee")

    def __exit__(self, *unused: object) -> None:
        with self._lock:
            if self._inside == 1:
                _write(self._backend, self._found)
            self._inside -= 1


ON = {device: FullProducts(device) for device in _BACKENDS}
