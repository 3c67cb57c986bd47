import pytest
import torch

from orthogonium.layers import MaxMin, OrthoLinear
from orthogonium.models import lipschitz_mlp


def test_layers_and_shapes():
    model = lipschitz_mlp(12, 5, width=6, depth=3, dtype=torch.float64)
    linear = [m for m in model if isinstance(m, OrthoLinear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(12, 6), (6, 6), (6, 5)]
    assert sum(isinstance(m, MaxMin) for m in model) == 2
    assert model(torch.ones(2, 3, 4, dtype=torch.float64)).shape == (2, 5)


@pytest.mark.parametrize("depth", [1, 4])
def test_distances_never_grow(depth):
    torch.manual_seed(0)
    model = lipschitz_mlp(8, 3, width=16, depth=depth, dtype=torch.float64).eval()
    x, y = torch.randn(2, 300, 8, dtype=torch.float64)
    assert ((model(x) - model(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 7}, r"width must be even, .* got 7\. Use 8"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": -2}, "width must be at least 1, got -2"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_mlp(4, 2, **arguments)
