import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from orthogonium.layers import GroupSort, MaxMin

CASES = [((5, 6), 1), ((2, 6, 3, 3), 1), ((3, 4, 6), -1), ((6,), 0)]


def gaussian(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("group_size", [2, 3, 6])
@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_each_group_is_sorted_largest_first(shape, dim, group_size):
    x = gaussian(shape)
    rows = x.movedim(dim, -1)
    expected = rows.clone()
    for start in range(0, 6, group_size):
        expected[..., start : start + group_size] = torch.sort(
            rows[..., start : start + group_size], descending=True
        ).values
    assert torch.equal(GroupSort(group_size, dim)(x), expected.movedim(-1, dim))


def test_max_min_is_a_group_of_two():
    x = gaussian((4, 8))
    assert torch.equal(MaxMin()(x), GroupSort(2)(x))
    assert_close(MaxMin()(torch.tensor([[1.0, 3.0, 2.0, -1.0]])), torch.tensor([[3.0, 1.0, 2.0, -1.0]]))


@pytest.mark.parametrize("group_size", [2, 4])
def test_gradient_keeps_its_norm(group_size):
    x = gaussian((3, 8), dtype=torch.float64).requires_grad_()
    up = gaussian((3, 8), seed=1, dtype=torch.float64)
    (down,) = torch.autograd.grad(GroupSort(group_size)(x), x, up)
    assert torch.equal(down.sort().values, up.sort().values)


@given(group_size=st.sampled_from([2, 3, 4, 6, 12]), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_never_grows_a_distance(group_size, seed, scale):
    x, y = gaussian((1, 12), seed, torch.float64), scale * gaussian((1, 12), seed + 1000, torch.float64)
    sort = GroupSort(group_size)
    for p in (1, 2, float("inf")):
        assert torch.dist(sort(x), sort(y), p) <= torch.dist(x, y, p) * (1 + 1e-14)  # rounding of 12 terms


def test_a_tie_keeps_the_gradient_bounded():
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(MaxMin(), x).reshape(2, 2)
    assert torch.linalg.matrix_norm(jacobian, ord=2) <= 1 + 1e-15


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        GroupSort(1)
    with pytest.raises(TypeError, match=r"int, got 2\.0"):
        GroupSort(2.0)
    with pytest.raises(ValueError, match=r"does not divide the 5 features on axis 1 .* multiple of 2"):
        MaxMin()(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"dim=1 is not an axis .* dim=-1"):
        MaxMin()(torch.ones(4))


def test_repr_shows_the_arguments():
    assert repr(GroupSort(4, dim=-1)) == "GroupSort(group_size=4, dim=-1)"
    assert repr(MaxMin()) == "MaxMin(dim=1)"
