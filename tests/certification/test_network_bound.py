"""The bound of whole networks: composition, sums, joins, what is refused and how that is said."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.certification import EXACT, Refused, Response, lipschitz_bound, lipschitz_rule, plain_network
from orthogonium.certification.rules import registry
from orthogonium.layers import GroupSort, MaxMin, OrthoLinear
from orthogonium.models import lipschitz_mlp


def scaled_identity(size, scale):
    layer = nn.Linear(size, size)
    nn.init.eye_(layer.weight).data.mul_(scale)
    return layer


class Written(nn.Module):
    """A module with parts, and a forward pass given as a function of itself and the input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def written(function, **parts):
    return Written(function, **parts).eval()


def test_factors_multiply_and_keep_their_paths():
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(scaled_identity(4, 2.0), MaxMin()), scaled_identity(4, 3.0)
    ).eval()
    result = lipschitz_bound(model)
    assert 6 <= result.bound <= 6 * (1 + 1e-6)
    assert [(layer.path, layer.kind) for layer in result.layers] == [
        ("0", "Flatten"), ("1.0", "Linear"), ("1.1", "MaxMin"), ("2", "Linear"),
    ]  # fmt: skip
    assert [layer.constant for layer in result.layers] == pytest.approx([1, 2, 1, 3], rel=1e-6)
    assert [layer.bound for layer in result.layers] == pytest.approx([1, 2, 2, 6], rel=1e-6)


def test_an_orthogonal_network_has_a_bound_just_above_one():
    bound = lipschitz_bound(lipschitz_mlp(16, 4, width=16, depth=3).eval()).bound
    assert bound == pytest.approx(1, abs=1e-4)  # float32 orthogonality of three layers


def test_bound_is_not_below_any_observed_slope():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), GroupSort(4), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    bound = lipschitz_bound(model).bound
    x, y = torch.randn(2, 500, 5, dtype=torch.float64)
    slopes = (model(x) - model(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert slopes.max() <= bound


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x + m.a(x), 3.0),
        (lambda m, x: m.a(x) - m.b(x), 5.0),
        (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), math.sqrt(13)),
        (lambda m, x: torch.stack((m.a(x), m.b(x)), -1), math.sqrt(13)),
        (lambda m, x: m.b(m.a(m.a(x))), 12.0),
        (lambda m, x: 0.5 * m.a(x) / 4 + 7, 0.25),
        (lambda m, x: m.a(x) if isinstance(m.a, nn.Linear) else None, 2.0),
        (lambda m, x: torch.maximum(m.a(x), m.b(x)), math.sqrt(13)),
        (lambda m, x: F.relu(F.linear(x, m.a.weight, m.a.bias)), 2.0),
        (lambda m, x: x.mul(m.a.weight.diagonal()).view(x.shape[0], 2, -1).flatten(1), 2.0),
        (lambda m, x: torch.zeros_like(x), 0.0),
        (lambda m, x: x + x, 2.0),
    ],
)
def test_graphs(function, expected):
    model = written(function, a=scaled_identity(4, 2.0), b=scaled_identity(4, 3.0))
    assert lipschitz_bound(model, (4,)).bound == pytest.approx(expected, rel=1e-6)
    assert lipschitz_bound(model, (4,)).bound >= expected
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain_network(model)(x.double()).float(), model(x))


def test_a_module_that_is_used_twice_counts_twice():
    double, sort = scaled_identity(4, 2.0), MaxMin()
    model = nn.Sequential(double, sort, double, sort).eval()
    assert len(lipschitz_bound(model).layers) == 4
    assert lipschitz_bound(model).bound == pytest.approx(4, rel=1e-6)


def test_module_lists_and_what_inherits_without_changing():
    class Named(OrthoLinear):
        def __init__(self, size):
            super().__init__(size, size)

    model = written(lambda m, x: m.layers[1](m.layers[0](x)), layers=nn.ModuleList([Named(4), Doubling(4, 4)]))
    result = lipschitz_bound(model)
    assert [(layer.path, layer.kind) for layer in result.layers] == [
        ("layers.0", "Named"), ("layers.1", "linear"), ("layers.1", "mul"),
    ]  # fmt: skip
    assert result.bound == pytest.approx(2 * torch.linalg.matrix_norm(model.layers[1].weight, 2).item(), rel=1e-5)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_model_may_be_one_layer():
    assert lipschitz_bound(scaled_identity(3, 2.0).eval()).layers[0].path == ""
    assert lipschitz_bound(og.OrthoConv2d(1, 2, 3).eval(), (1, 4, 4)).bound == pytest.approx(1, abs=1e-5)


def test_parametrized_weights_and_constants_are_those_of_evaluation():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6), n_power_iterations=1)
    truth = torch.linalg.matrix_norm(layer.eval().weight.double(), 2).item()
    assert truth * (1 - 1e-12) <= lipschitz_bound(layer).bound <= truth * (1 + 1e-6)


def test_what_the_result_says():
    result = lipschitz_bound(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval())
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "what", "constant", "bound", "so", "far"]
    assert lines[2].split()[:2] == ["0", "Linear"]
    assert lines[-1] == f"Lipschitz bound of the network: {result.bound:.9g}"
    assert json.loads(result.to_json()) == result.to_dict()
    assert result.to_dict()["layers"][1] == {"path": "1", "kind": "ReLU", "constant": 1.0, "bound": result.bound}


STRANGERS = [
    nn.LayerNorm(4),
    nn.GroupNorm(2, 4),
    nn.Hardshrink(),
    nn.GLU(),
    nn.InstanceNorm1d(4),
    nn.CosineSimilarity(),
]
STRANGERS += [nn.MultiheadAttention(4, 1), nn.LSTM(4, 4), nn.Embedding(4, 4), nn.Bilinear(4, 4, 4), nn.Threshold(0, 2)]
STRANGERS += [
    nn.MaxPool1d(2, return_indices=True),
    nn.Fold(2, 2),
    nn.Transformer(4, 1),
    nn.LPPool1d(2, 2, ceil_mode=True),
]


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda module: type(module).__name__)
def test_an_unknown_module_is_refused_by_path(stranger):
    model = nn.Sequential(nn.Identity(), nn.Sequential(OrthoLinear(4, 4), stranger)).eval()
    with pytest.raises(TypeError, match=rf"^1\.1 (is a |\(){type(stranger).__name__}") as error:
        lipschitz_bound(model)
    assert len(str(error.value)) > 60  # a reason, or what to do


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, r"test_network_bound.py:\d+ .*control flow"),
        (lambda m, x: x * x, "multiplies two tensors"),
        (lambda m, x: x**2, "to the power 2"),
        (lambda m, x: x / (1 + x), "divides by a tensor"),
        (lambda m, x: x / x.norm(dim=1, keepdim=True), "divides by a tensor"),
        (lambda m, x: torch.fft.fft(x), "calls fft_fft, whose Lipschitz constant is not known"),
        (lambda m, x: F.dropout(x), "training=True"),
        (lambda m, x: F.layer_norm(x, (4,)), "statistics of its input"),
        (lambda m, x: torch.exp(x), "unbounded slope"),
        (lambda m, x: x @ x[:, :, None], "multiplies two tensors|cannot take"),
        (lambda m, x: x[:, None] @ x[:, :, None], "multiplies two tensors"),
        (lambda m, x: x.sort(1)[1], "indices of sort"),
        (lambda m, x: x[torch.tensor([0])], "indexes by a tensor"),
        (lambda m, x: x[:, [0, 0]], "indexes by a tensor or a list"),
        (lambda m, x: x[:, (0, 0)], "indexes by a tensor or a list"),
        (lambda m, x: x.to(torch.int64), "which jumps"),
        (lambda m, x: x.long(), "calls long"),
        (lambda m, x: torch.where(x > 0, x, x + 1), "calls gt"),
        (lambda m, x: x.expand(-1, 4), "repeats entries"),
        (lambda m, x: x[:, None] @ m.w, None),
        (lambda m, x: torch.mean(x), "reduces all axes"),
        (lambda m, x: x.sum(0), "mixes the batch"),
        (lambda m, x: (x, x), "must return one tensor, got tuple"),
        (lambda m, x: {"logits": x}, "must return one tensor"),
        (lambda m, x: x.shape, "got a size"),
        (lambda m, x: m.w + 0, "returns a constant|must return one tensor, got"),
        (lambda m, x: m.hidden[0](x), "not registered as one of its own"),
        (lambda m, x: x * x.shape[0], "depend on the batch"),
        (lambda m, x: torch.add(x, x, alpha=2), "alpha=2"),
        (lambda m, x: F.softmax(x, 0), "mixes the batch"),
        (lambda m, x: x * (1 + 2j), "no real number"),
        (lambda m, x: x / 0, "divides by zero"),
        (lambda m, x: x.add_(1), "calls add_"),
        (lambda m, x: F.relu(x, inplace=True) + x, "works in place on a tensor that is read again"),
        (lambda m, x: in_place_sum(x) + x, "works in place"),
        (lambda m, x: torch.relu_(x.view(-1, 4)) + x, "works in place"),
        (lambda m, x: 1 / x, "divides by a tensor"),
        (lambda m, x: m.w.T * x.mean(1)[:, None, None] @ x, "multiplies two|broadcasts|cannot take"),
        (lambda m, x: torch.tensor([1.0]) if len(x) else x, "cannot be followed"),
        (lambda m, x: torch.add(x, 1, out=x), "writes into out="),
    ],
)
def test_what_cannot_be_bounded_is_refused_with_a_reason(function, message):
    model = nn.Sequential(written(function, w=nn.Parameter(torch.randn(4, 4)), hidden=[nn.Linear(4, 4)])).eval()
    if message is None:  # its neighbours are refused, it is not
        assert lipschitz_bound(model, (4,)).bound > 0
        return
    with pytest.raises((TypeError, ValueError), match=message):
        lipschitz_bound(model, (4,))


def in_place_sum(x):
    y = x
    y += 1
    return y


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: x.transpose(0, 1), (4,)),
        (lambda m, x: x.reshape(-1, 2), (4,)),
        (lambda m, x: x[0], (4,)),
        (lambda m, x: x.reshape(-1), (4,)),
        (lambda m, x: x.reshape(2, -1), (6,)),
        (lambda m, x: x.unsqueeze(0), (4,)),
    ],
)
def test_what_moves_the_batch_is_refused(function, shape):
    with pytest.raises(ValueError, match=r"merges or moves the batch|cannot take an input"):
        lipschitz_bound(written(function), shape)


def test_in_place_operations_on_fresh_memory_are_fine():
    model = written(lambda m, x: in_place_sum(F.relu(m.a(x), inplace=True)) + x, a=scaled_identity(4, 2.0))
    assert lipschitz_bound(model, (4,)).bound == pytest.approx(3, rel=1e-6)
    x = torch.randn(5, 4)
    torch.testing.assert_close(plain_network(model)(x.double()).float(), model(x))


def test_sizes_of_a_tensor_may_be_used_after_it_was_changed():
    def forward(model, x):
        y = model.a(x)
        count = y.shape[1]
        return F.relu(y, inplace=True).view(-1, count)

    assert lipschitz_bound(written(forward, a=scaled_identity(4, 2.0)), (4,)).bound == pytest.approx(2)


def test_sums_need_shapes_because_of_broadcasting():
    model = written(lambda m, x: x[:, :1] + m.a(x), a=scaled_identity(4, 1.0))
    with pytest.raises(TypeError, match="Pass input_shape"):
        lipschitz_bound(model)
    assert lipschitz_bound(model, (4,)).bound == pytest.approx(2 + 1, rel=1e-6)  # √4 of the column, and 1


def test_hooks_are_refused_or_followed():
    model = nn.Sequential(OrthoLinear(4, 4)).eval()
    handle = model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(TypeError, match=r"0 \(OrthoLinear\) has forward hooks"):
        lipschitz_bound(model)
    handle.remove()
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert lipschitz_bound(model).bound == pytest.approx(2, rel=1e-5)
    with pytest.raises(TypeError, match="weight_norm"):
        lipschitz_bound(nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))).eval())


def test_hooks_on_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        with pytest.raises(TypeError, match="has forward hooks"):
            lipschitz_bound(nn.Sequential(nn.Linear(3, 3)).eval())
    finally:
        handle.remove()


def test_a_forward_of_its_own_is_refused():
    model = nn.Sequential(nn.Identity()).eval()
    model[0].forward = lambda x: 2 * x
    with pytest.raises(TypeError, match="a forward of its own"):
        lipschitz_bound(model)


def test_training_mode_nan_complex_and_merged_batches_are_refused():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        lipschitz_bound(nn.Sequential(nn.Dropout()))
    model = nn.Sequential(nn.Identity(), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match="1 is in training mode"):
        lipschitz_bound(model)
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.bias \(Linear\) holds NaN"):
        lipschitz_bound(nn.Sequential(broken).eval())
    with pytest.raises(ValueError, match=r"0\.weight \(Linear\) is complex"):
        lipschitz_bound(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)).eval())
    with pytest.raises(TypeError, match="start_dim=0, which merges the batch"):
        lipschitz_bound(nn.Sequential(nn.Flatten(0)).eval())
    with pytest.raises(TypeError, match="dim=0, which mixes the batch"):
        lipschitz_bound(nn.Sequential(MaxMin(dim=0)).eval())
    with pytest.raises(TypeError, match="dim=0, which mixes the batch"):
        lipschitz_bound(nn.Sequential(MaxMin(dim=-2)).eval(), (2,))
    with pytest.raises(TypeError, match=r"0 \(Linear\) takes \(N, 6\), got \('N', 5\)"):
        lipschitz_bound(nn.Sequential(nn.Linear(6, 2)).eval(), (5,))


@pytest.fixture
def own_rules():
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


class Halving(nn.Module):
    def forward(self, x):
        return x / 2 if x.sum() > 0 else x / 4


def test_users_add_rules_for_modules_and_functions(own_rules):
    model = nn.Sequential(scaled_identity(4, 2.0), Halving()).eval()
    with pytest.raises(TypeError, match="1 cannot be followed"):
        lipschitz_bound(model)

    @lipschitz_rule(Halving)
    def _(module, x):
        return 0.5

    assert lipschitz_bound(model).bound == pytest.approx(1, rel=1e-6)
    with pytest.raises(TypeError, match="nothing is known about its rounding"):
        og.certify(model, torch.ones(1, 4))

    @lipschitz_rule(Halving, torch.special.expit)
    def _(*arguments):
        return Response(0.5, EXACT)

    assert og.certify(model, torch.ones(1, 4)).lipschitz == pytest.approx(1, rel=1e-6)
    assert lipschitz_bound(written(lambda m, x: torch.special.expit(x))).bound == 0.5

    @lipschitz_rule(Halving)
    def _(module, x):
        raise Refused("is not for today")

    with pytest.raises(TypeError, match=r"^1 \(Halving\) is not for today"):
        lipschitz_bound(model)

    @lipschitz_rule(Halving)
    def _(module, x):
        return float("nan")

    with pytest.raises(TypeError, match="gave nan: a constant of at least 0"):
        lipschitz_bound(model)
    with pytest.raises(TypeError, match="module type, a function or the name"):
        lipschitz_rule(3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_refused_by_path():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)
    with pytest.raises(TypeError, match="0 is a Linear, whose Lipschitz constant is not known"):
        lipschitz_bound(model.eval(), (4,))
