import pytest
import torch

import orthogonium as og
from orthogonium.models import lipschitz_cnn


def test_layers_and_shapes():
    model = lipschitz_cnn(64, 5, width=32, depth=5)
    convolutions = [(m.in_channels, m.out_channels, m.stride) for m in model if isinstance(m, og.OrthoConv2d)]
    assert convolutions == [(1, 2, (1, 1)), (2, 8, (2, 2)), (8, 8, (1, 1))]
    assert model(torch.ones(2, 64)).shape == model(torch.ones(2, 1, 8, 8)).shape == (2, 5)
    assert og.lipschitz_bound(model.eval(), (64,)).bound < 1 + 1e-4


def test_distances_never_grow():
    torch.manual_seed(0)
    model = lipschitz_cnn(36, 3, width=32, dtype=torch.float64).eval()
    x, y = torch.randn(2, 300, 36, dtype=torch.float64)
    assert ((model(x) - model(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 63}, "square of an even side, got 63"),
        ({"in_features": 25}, "square of an even side, got 25"),
        ({"width": 100}, "multiple of 32, got 100. Use 96"),
        ({"depth": 3}, "depth must be at least 4"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lipschitz_cnn(**({"in_features": 64, "out_features": 10} | arguments))
