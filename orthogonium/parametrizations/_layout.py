"""Where the entries of a weight lie: by columns, where a linear layer multiplies a batch of inputs by it."""

import torch
from torch import Tensor

_LEAST_SIDE = 64  # below, and for the few outputs of a classifier, rows are as fast or faster
_GAP = 16  # entries between columns: where a power of two is between them, they share few sets of the cache
_HAS_MKL = torch.backends.mkl.is_available()  # with which it was measured


def by_columns(weight: Tensor) -> Tensor:
    """The matrix ``W``, ``(m, n)``, in the memory layout in which ``x Wᵀ`` is fastest: a copy where that is another.

    BLAS packs ``W`` before it multiplies, and packs whole lines where it lies by columns. At 512 × 512 on one core the
    product takes two thirds of the time with 8 to 32 inputs, 0.85 with 128, and the same with one or from 512 on.
    """
    suits = _HAS_MKL and weight.dtype == torch.float32 and weight.device.type == "cpu"
    if not suits or min(weight.shape) < _LEAST_SIDE:
        return weight
    rows, columns = weight.shape
    return weight.new_empty_strided((rows, columns), (1, rows + _GAP)).copy_(weight)
