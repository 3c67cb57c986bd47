import pytest
import torch
from torch import nn

from orthogonium.certification import lipschitz_product
from orthogonium.layers import GroupSort, MaxMin, OrthoLinear
from orthogonium.models import lipschitz_mlp


def scaled_identity(size, scale):
    layer = nn.Linear(size, size)
    nn.init.eye_(layer.weight).data.mul_(scale)
    return layer


def test_factors_multiply_and_keep_their_paths():
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(scaled_identity(4, 2.0), MaxMin()), scaled_identity(4, 3.0)
    ).eval()
    result = lipschitz_product(model)
    assert 6 <= result.bound <= 6 * (1 + 1e-6)
    assert [(layer.path, layer.kind) for layer in result.layers] == [
        ("0", "Flatten"), ("1.0", "Linear"), ("1.1", "MaxMin"), ("2", "Linear"),
    ]  # fmt: skip
    assert [layer.bound for layer in result.layers] == pytest.approx([1, 2, 1, 3], rel=1e-6)


def test_an_orthogonal_network_has_a_bound_just_above_one():
    bound = lipschitz_product(lipschitz_mlp(16, 4, width=16, depth=3).eval()).bound
    assert bound == pytest.approx(1, abs=1e-4)  # float32 orthogonality of three layers


def test_bound_is_not_below_any_observed_slope():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), GroupSort(4), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    bound = lipschitz_product(model).bound
    x, y = torch.randn(2, 500, 5, dtype=torch.float64)
    slopes = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert slopes.max() <= bound


def test_a_module_that_is_used_twice_counts_twice():
    double, sort = scaled_identity(4, 2.0), MaxMin()
    model = nn.Sequential(double, sort, double, sort).eval()
    assert len(lipschitz_product(model).layers) == 4
    assert lipschitz_product(model).bound == pytest.approx(4, rel=1e-6)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("stranger", [nn.Sigmoid(), nn.LayerNorm(4), Doubling(4, 4), nn.Conv2d(1, 1, 1)], ids=repr)
def test_an_unknown_module_is_refused_by_path(stranger):
    model = nn.Sequential(nn.Identity(), nn.Sequential(OrthoLinear(4, 4), stranger)).eval()
    with pytest.raises(TypeError, match=rf"1\.1 is a {type(stranger).__name__}"):
        lipschitz_product(model)


def test_hooks_are_refused():
    model = nn.Sequential(OrthoLinear(4, 4)).eval()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(TypeError, match=r"0 \(\w*OrthoLinear\) has forward hooks"):
        lipschitz_product(model)


def test_a_forward_of_its_own_is_refused():
    model = nn.Sequential(nn.Identity()).eval()
    model[0].forward = lambda x: 2 * x
    with pytest.raises(TypeError, match="a forward of its own"):
        lipschitz_product(model)


def test_one_layer_in_training_mode_is_enough_to_refuse():
    model = nn.Sequential(nn.Identity(), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match="training mode"):
        lipschitz_product(model)


def test_training_mode_nan_and_merged_batches_are_refused():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        lipschitz_product(nn.Sequential(nn.Dropout()))
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.bias \(Linear\) holds NaN"):
        lipschitz_product(nn.Sequential(broken).eval())
    with pytest.raises(ValueError, match="start_dim=0, which merges the batch"):
        lipschitz_product(nn.Sequential(nn.Flatten(0)).eval())
    with pytest.raises(ValueError, match="dim=0, which mixes the batch"):
        lipschitz_product(nn.Sequential(MaxMin(dim=0)).eval())
