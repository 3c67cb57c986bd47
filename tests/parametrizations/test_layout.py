"""The memory layout for products is another arrangement of the same numbers, where it pays."""

import pytest
import torch

from orthogonium.parametrizations._layout import by_columns
from tests.helpers import gaussian

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the layout is one for MKL")


@needs_mkl
@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (128, 64), (100, 70)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_columns_with_gaps(shape, transposed):
    weight = gaussian(shape, dtype=torch.float32)
    weight = weight.mT if transposed else weight
    found = by_columns(weight)
    assert torch.equal(found, weight)
    assert found.stride() == (1, weight.shape[0] + 16)
    assert found.data_ptr() != weight.data_ptr()
    x = gaussian((3, weight.shape[1]), dtype=torch.float32, seed=1)
    torch.testing.assert_close(x @ found.mT, x @ weight.mT)


@pytest.mark.parametrize("shape", [(63, 64), (64, 63), (10, 512), (512, 3), (0, 5)])
def test_small_sides_stay(shape):
    weight = gaussian(shape, dtype=torch.float32)
    assert by_columns(weight) is weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay(dtype):
    weight = torch.ones(64, 64, dtype=dtype)
    assert by_columns(weight) is weight
