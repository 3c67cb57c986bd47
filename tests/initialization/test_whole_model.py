"""Models after ``initialize``: singular values, sizes of signals, what is kept, what is refused."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import orthogonium as og
from orthogonium.initialization import Scale, UnstableVarianceWarning, criticality, initialize, with_scaled_ends
from orthogonium.layers import AOLConv2d, OrthoConv2d, OrthoLinear, UnitNormLinear, singular_values

ROOT2 = math.sqrt(2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(widths, activation=nn.Tanh, **keywords):
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, **keywords), activation()]
    return nn.Sequential(*layers[:-1])


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


def test_linear_layers_are_the_gain_times_orthogonal():
    model = mlp([6, 6, 4, 9], nn.ReLU, dtype=torch.float64)
    report = initialize(model, "relu", generator=generator())
    for layer, expected in zip(model[::2], (ROOT2, ROOT2, ROOT2 * math.sqrt(9 / 4)), strict=True):
        values = torch.linalg.svdvals(layer.weight.detach())
        assert_close(values, torch.full_like(values, expected), rtol=1e-13, atol=0)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    assert [start.scale for start in report.layers] == pytest.approx([ROOT2, ROOT2, ROOT2 * 1.5])
    assert report.kept == []


@pytest.mark.parametrize("kind", ["orthogonal", "delta_orthogonal"])
def test_convolutions_are_the_gain_times_orthogonal_as_operators(kind):
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3, dtype=torch.float64))
    initialize(model, kind=kind, gain=1.25, generator=generator())
    values = singular_values(conv, (4, 4, 4))
    assert_close(values, torch.full_like(values, 1.25), rtol=1e-12, atol=0)
    off_centre = conv.weight.detach().clone()
    off_centre[:, :, 1, 1] = 0
    assert bool(off_centre.any()) == (kind == "orthogonal")


def test_gaussian_entries_have_the_variance_of_their_fan_in():
    model = nn.Sequential(
        nn.Linear(300, 400), nn.Conv1d(40, 60, 5, groups=2), nn.ConvTranspose2d(64, 48, 4, stride=2), nn.Tanh()
    )
    initialize(model, "tanh", "gaussian", gain=1.5, generator=generator())
    for layer, fan in zip(model, (300, 100, 64 * 4), strict=False):
        assert rms(layer.weight) == pytest.approx(1.5 / math.sqrt(fan), rel=0.03)  # 6,000 draws at least


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "delta_orthogonal"])
def test_signals_keep_their_size_across_changes_of_width(kind):
    widths = [64, 256, 128, 512, 512, 64, 300]
    model = mlp(widths, nn.Identity, bias=False)
    initialize(model, "linear", kind, generator=generator())
    x = torch.randn(200, 64, generator=generator(1))
    assert rms(model(x)) == pytest.approx(1, rel=0.1)
    images = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(64, 256, 1, stride=2),
        nn.ConvTranspose2d(256, 64, 2, stride=2),
    )
    initialize(images, "linear", kind, generator=generator())
    assert rms(images(torch.randn(20, 8, 16, 16, generator=generator(1)))) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_variance_settles_where_theory_says(kind):
    theory = og.initialization.signal_through_depth("tanh", 5 / 3, depth=30)
    model = mlp([256] * 32)
    initialize(model, "tanh", kind, gain=5 / 3, generator=generator())
    x = torch.randn(64, 256, generator=generator(1)) / (5 / 3)  # first pre-activations of variance one
    measured, tolerance = [], 0.02 if kind == "orthogonal" else 0.1  # width 256, one draw
    for layer in model[:60]:
        x = layer(x)
        if isinstance(layer, nn.Tanh):
            measured.append(rms(x))
    assert_close(torch.tensor(measured).double(), theory.activation_rms, rtol=tolerance, atol=0)


def test_depth_makes_an_isometry_and_ends_are_scaled():
    model = mlp([64] * 101, dtype=torch.float64)
    report = initialize(model, depth=100, generator=generator())
    point = criticality("tanh", 100)
    assert (report.sigma_w, report.sigma_b, report.q) == (point.sigma_w, point.sigma_b, point.q)
    assert rms(torch.cat([layer.bias for layer in model[::2]])) == pytest.approx(point.sigma_b, rel=0.05)
    assert report.input_scale == pytest.approx(math.sqrt(point.second_moment))
    scaled = with_scaled_ends(model, report)
    assert list(dict(scaled.named_children()))[:2] == ["input_scale", "0"]
    x = torch.randn(64, generator=generator(1), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(scaled, x)  # scales cancel
    squared = torch.linalg.svdvals(jacobian) ** 2
    assert 0.6 < squared.mean() < 1.4
    assert squared.var() < 0.3  # 0.1 at infinite width
    initialize(model, gain=1.0)
    assert torch.equal(scaled[1].weight, model[0].weight)


@pytest.mark.parametrize(("activation", "module"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("leaky_relu", nn.LeakyReLU)])
def test_looks_linear_networks_are_isometries(activation, module):
    model = mlp([8, *[16] * 199, 8], module, dtype=torch.float64)
    initialize(model, activation, "looks_linear", generator=generator())
    x = torch.randn(8, generator=generator(1), dtype=torch.float64)
    values = torch.linalg.svdvals(torch.autograd.functional.jacobian(model, x))
    assert_close(values, torch.ones_like(values), rtol=0, atol=2e-14)  # 200 layers, a few 1e-16 each, not all one way
    assert_close(model(2 * x), 2 * model(x))


def test_looks_linear_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).double()
    initialize(model, "relu", "looks_linear", generator=generator())
    x = torch.randn(2, 3, 5, 5, generator=generator(1), dtype=torch.float64)
    y = model(x)
    assert_close(y.square().sum(1), x.square().sum(1) * 4 / 3)  # 3 to 4 features, entries keep their size
    with pytest.raises(ValueError, match="pairs the outputs of a weight of shape"):
        og.looks_linear_(torch.empty(3, 4))
    with pytest.raises(ValueError, match="position must be one of first, hidden, last, got 'end'"):
        og.looks_linear_(torch.empty(4, 4), "end")
    with pytest.raises(ValueError, match="tanh\\(u\\) − tanh\\(−u\\) is not linear"):
        initialize(mlp([4, 4, 4]), "tanh", "looks_linear")
    with pytest.raises(ValueError, match="0: position='first' pairs the outputs"):
        initialize(mlp([4, 3, 4], nn.ReLU), "relu", "looks_linear")


def test_an_error_leaves_the_model_as_it_was():
    model = mlp([4, 4, 3, 4], nn.ReLU)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="is odd"):
        initialize(model, "relu", "looks_linear")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("recurrent", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_gate_by_gate(recurrent):
    module = recurrent(5, 8, num_layers=2, bidirectional=True, dtype=torch.float64)
    initialize(module, generator=generator())
    gates = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}[recurrent]
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh"):
            for block in weight.detach().chunk(gates):
                assert_close(block @ block.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)
    for layer in (0, 1):
        bias = getattr(module, f"bias_ih_l{layer}").detach()
        if gates > 1:
            keep = bias.chunk(gates)[1]
            times = 1 + keep.sort().values.exp()
            assert_close(times, 2 + 998 * (torch.arange(8, dtype=torch.float64) + 0.5) / 8)
        else:
            assert not bias.any()


@pytest.mark.parametrize(("recurrent", "least"), [(nn.LSTM, 0.5), (nn.GRU, 0.7), (nn.RNN, 0.9)])
def test_states_of_recurrent_layers_survive_a_hundred_steps(recurrent, least):
    torch.manual_seed(0)
    module = recurrent(4, 16)
    width = 32 if recurrent is nn.LSTM else 16

    def last(state):
        start = tuple(state.chunk(2, -1)) if recurrent is nn.LSTM else state
        end = module(torch.zeros(100, 1, 4), start)[1]
        return torch.cat(end, -1) if recurrent is nn.LSTM else end

    def size():
        jacobian = torch.autograd.functional.jacobian(last, torch.full((1, 1, width), 0.01)).view(width, width)
        return float(jacobian.square().sum().div(width).sqrt())

    assert size() < 1e-6
    initialize(module, generator=generator())
    assert least < size() < 1.1


def test_horizon():
    module = nn.LSTMCell(3, 50)
    initialize(module, horizon=10, generator=generator())
    forget = module.bias_ih.detach().chunk(4)[1]
    assert math.log(95) < forget.max() <= math.log(99)
    with pytest.raises(ValueError, match="horizon=10 is for LSTM and GRU layers, and model has none"):
        initialize(nn.RNN(3, 3), horizon=10)
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1 step, got 0"):
        initialize(module, horizon=0)


@pytest.mark.parametrize("horizon", [10, 40])
@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_half_of_a_state_is_left_after_the_horizon(recurrent, size, horizon):
    """At any horizon alike, and at most all of it."""
    torch.manual_seed(0)
    module, parts = recurrent(16, 16, dtype=torch.float64), 2 if recurrent is nn.LSTM else 1
    initialize(module, horizon=horizon, generator=generator())
    x = size * torch.randn(horizon, 1, 16, dtype=torch.float64)

    def last(state):
        found = module(x, tuple(state.chunk(2, -1)) if parts == 2 else state)[1]
        return torch.cat(found, -1) if parts == 2 else found

    jacobian = torch.autograd.functional.jacobian(last, torch.zeros(1, 1, 16 * parts, dtype=torch.float64))
    assert 0.5 <= float(jacobian.square().sum().div(16 * parts).sqrt()) <= 1


def test_attention_projections_one_by_one():
    module = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    initialize(module)
    for block in (*module.in_proj_weight.detach().chunk(3), module.out_proj.weight.detach()):
        assert_close(block @ block.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-14)


def test_what_is_kept():
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.PReLU(), nn.Bilinear(4, 4, 2)
    )
    model[3].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialize(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.weight", "1.bias"}
    assert report.kept == ["0", "2", "3", "4", "5"]
    assert "3: Linear: kept: frozen" in str(report)


def test_frozen_weights_keep_their_biases():
    model = nn.Sequential(nn.Linear(3, 3), OrthoLinear(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].parametrizations.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert initialize(model).kept == ["0", "1"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_shares_the_embedding_keeps_it():
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    report = initialize(nn.Sequential(embedding, nn.Linear(4, 4), head))
    assert report.kept == ["0", "2"]
    assert torch.equal(embedding.weight, before)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert og.gain(nn.ELU(0.7), criterion="variance") > 1
        theory = og.initialization.signal_through_depth(torch.tanh, 1.0, depth=3)
    assert theory.chi.device.type == "cpu"


def test_shared_weights_are_drawn_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, second.bias = first.weight, first.bias
    report = initialize(nn.Sequential(first, second), generator=generator())
    assert report.kept == ["1"]


def test_constrained_layers_get_what_their_constraint_lets_through():
    norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(OrthoConv2d(4, 4, 3), OrthoLinear(4, 6), UnitNormLinear(6, 4), AOLConv2d(4, 4, 3), norm)
    before = [layer.weight.detach().clone() for layer in model]
    report = initialize(model, "relu", generator=generator())
    scales = {start.name: start.scale for start in report.layers}
    assert scales["0"] == scales["1"] == scales["2"] == 1.0
    assert scales["4"] == pytest.approx(ROOT2)
    for old, layer in zip(before, model, strict=True):
        assert not torch.equal(old, layer.weight) or scales.get(str(list(model).index(layer))) is None
    values = torch.linalg.svdvals(model[1].weight.detach())
    assert_close(values, torch.ones(4), rtol=0, atol=2e-6)
    assert_close(torch.linalg.svdvals(norm.weight.detach()), torch.full((4,), ROOT2))
    again = nn.Sequential(OrthoConv2d(4, 4, 3), OrthoLinear(4, 6))
    initialize(again, "relu", generator=generator())
    assert torch.equal(again[1].weight, model[1].weight)


def test_generators_make_draws_reproducible_and_leave_the_global_state():
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4), nn.LSTM(4, 4)) for _ in "ab"]
    state = torch.get_rng_state()
    for model in models:
        initialize(model, depth=10, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    initialize(models[1], depth=10, generator=generator(4))
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_half_precision_is_drawn_in_float32():
    model = nn.Linear(64, 64).bfloat16()
    initialize(model)
    weight = model.weight.detach().float()
    assert (weight @ weight.T - torch.eye(64)).abs().max() < 0.01  # eight bits, rounded once


def test_unstable_activations_get_biases():
    model = mlp([32, 64, 64], nn.GELU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = initialize(model, "gelu", generator=generator())
    assert report.sigma_w**2 == pytest.approx(1.98305826, abs=1e-8)
    assert rms(model[2].bias) == pytest.approx(math.sqrt(0.17292239), rel=0.3)  # 64 draws
    with pytest.warns(UnstableVarianceWarning) as caught:
        initialize(model, "gelu", depth=3)
    assert caught[0].filename == __file__


def test_another_activation_than_the_models_is_warned_of():
    with pytest.warns(UserWarning, match=r'activations are ReLU: pass activation="relu"') as caught:
        initialize(mlp([4, 4, 4], nn.ReLU))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize(mlp([4, 4, 4], nn.LeakyReLU), "leaky_relu")
        initialize(mlp([4, 4, 4], nn.SiLU), "swish")
        initialize(mlp([4, 4, 4], nn.ReLU), nn.ReLU())


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"kind": "xavier"}, "kind must be one of orthogonal"),
        ({"kind": "gaussian", "depth": 5}, "5 Gaussian layers are none"),
        ({"gain": 2.0, "depth": 5}, "gain=2.0 and depth exclude each other"),
        ({"gain": 0.0}, "gain must be positive and finite, got 0.0"),
        ({"activation": "relu", "kind": "looks_linear", "depth": 5}, "an isometry at every depth"),
        ({"activation": "relu", "depth": 50}, "50 layers of relu are no isometry"),
    ],
)
def test_refused_arguments(keywords, match):
    model = mlp([4, 4, 4])
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        initialize(model, **keywords)
    assert torch.equal(model[0].weight, before)


def test_refused_models():
    with pytest.raises(ValueError, match=r"weight has no shape yet"):
        initialize(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="to_empty"):
        initialize(nn.Linear(3, 3, device="meta"))
    report = initialize(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model must be an nn.Sequential, got Linear"):
        with_scaled_ends(nn.Linear(3, 3), report)
    with pytest.raises(ValueError, match="1 entries with weights"):
        with_scaled_ends(nn.Sequential(nn.Linear(3, 3)), report)
    assert "factor" not in Scale(2.0).state_dict()
    assert repr(Scale(0.5)) == "Scale(0.5)"


def test_a_deep_tanh_network_learns_from_it_and_not_from_the_default():
    x = torch.randn(256, 16, generator=generator())
    labels = x[:, :4].argmax(1)

    def learn(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / 200, momentum=0.9)
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    torch.manual_seed(0)
    assert learn(mlp([16] * 200 + [4])) > 1.35  # ln 4 = 1.386: nothing learned
    model = mlp([16] * 200 + [4])
    report = initialize(model, depth=200, generator=generator())
    assert learn(with_scaled_ends(model, report)) < 0.9


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight


def test_a_constraint_that_returns_something_else_keeps_its_weight():
    layer = nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    before = layer.weight.detach().clone()
    report = initialize(layer)
    assert torch.equal(layer.weight, before)
    assert report.kept == [""]
    assert "kept: its constraint takes no orthogonal weight" in str(report)


@pytest.mark.parametrize(
    "make",
    [
        lambda: og.OrthoLSTM(3, 4),
        lambda: og.OrthoGRU(3, 4, 2, bidirectional=True, constrain_inputs=True),
        lambda: og.OrthoRNN(3, 4, nonlinearity="relu", bias=False, constrain_inputs=True),
        lambda: og.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight"),
    ],
    ids=["lstm", "gru", "rnn", "attention"],
)
def test_constrained_stacks_are_drawn_too(make):
    """By the generator alone, and to what the report says of them."""
    models = make(), make()
    for model in models:
        (row,) = og.initialize(model, "tanh", generator=torch.Generator().manual_seed(0)).layers[:1]
        assert row.scale == 1
    names = [n for n, p in models[0].named_parameters() if "original" in n]
    assert names
    for name in {n.split(".")[1] for n in names}:
        first, second = (getattr(model, name).detach() for model in models)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
