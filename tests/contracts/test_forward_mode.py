"""Forward-mode derivatives, by dual numbers and by ``torch.func.jvp``, agree with the reverse-mode Jacobian."""

import pytest
import torch
from torch.autograd import forward_ad

from orthogonium import OrthoLinear
from orthogonium.reparametrizers import PRESETS
from tests.helpers import gaussian

ROUNDING = 64 * torch.finfo(torch.float64).eps  # a few products of 3×3 matrices


@pytest.mark.parametrize("preset", PRESETS)
def test_tangent_of_the_weight(preset):
    layer = OrthoLinear(3, 3, bias=False, ortho_params=PRESETS[preset], dtype=torch.float64)
    layer.weight = gaussian((3, 3), dtype=torch.float64, seed=1)
    free = layer.parametrizations.weight.original.detach().clone()
    tangent = gaussian((3, 3), dtype=torch.float64, seed=2)

    def weight(free):
        values = {"parametrizations.weight.original": free}
        return torch.func.functional_call(layer, values, (torch.eye(3, dtype=torch.float64),))

    expected = torch.einsum("abcd,cd->ab", torch.func.jacrev(weight)(free), tangent)
    assert expected.abs().max() > 0.01
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(weight(forward_ad.make_dual(free, tangent))).tangent
    for found in (dual, torch.func.jvp(weight, (free,), (tangent,))[1]):
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
