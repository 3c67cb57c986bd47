import pytest
import torch
from torch import nn
from torch.testing import assert_close

from orthogonium.initialization import conv_orthogonal_, delta_orthogonal_
from orthogonium.layers import singular_values

CIRCULAR = {"padding_mode": "circular", "dtype": torch.float64}


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("sizes", "stride", "groups"), [((4, 6), 1, 1), ((6, 4), 1, 2), ((2, 8), 2, 1), ((4, 4), 2, 2)]
)
def test_every_singular_value_is_the_gain(dims, sizes, stride, groups):
    sides = (6, 4, 4)[:dims]
    kernel = 3 if stride == 1 else 2
    conv = getattr(nn, f"Conv{dims}d")(
        *sizes, kernel, stride, padding=kernel // 2 * (stride == 1), groups=groups, **CIRCULAR
    )
    for fill in (conv_orthogonal_, delta_orthogonal_) if stride == 1 else (conv_orthogonal_,):
        keywords = {"stride": stride} if fill is conv_orthogonal_ else {}
        assert fill(conv.weight, groups=groups, gain=1.5, generator=generator(), **keywords) is conv.weight
        values = singular_values(conv, (sizes[0], *sides))
        assert_close(values, torch.full_like(values, 1.5), rtol=1e-12, atol=0)


def test_draws_follow_the_generator_and_differ():
    first, second = torch.empty(4, 4, 3, 3), torch.empty(4, 4, 3, 3)
    conv_orthogonal_(first, generator=generator())
    conv_orthogonal_(second, generator=generator())
    assert torch.equal(first, second)
    conv_orthogonal_(second)
    assert not torch.equal(first, second)


def test_delta_is_a_matrix_at_the_centre():
    kernel = torch.full((4, 4, 3, 4), 7.0)
    delta_orthogonal_(kernel, generator=generator())
    assert kernel.count_nonzero() == kernel[:, :, 1, 1].count_nonzero() == 16


def test_refused():
    with pytest.raises(ValueError, match=r"tensor must be \(out, in / groups, \*k\)"):
        conv_orthogonal_(torch.empty(3, 3))
    with pytest.raises(ValueError, match="room for 4 channels"):
        conv_orthogonal_(torch.empty(8, 4, 1, 1), stride=2)
    with pytest.raises(ValueError, match="groups=3 must divide the 4 channels"):
        delta_orthogonal_(torch.empty(4, 4, 3, 3), groups=3)
