"""The report sees what was planted, measures what it says, and leaves the model alone."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import orthogonium as og
from orthogonium.diagnostics import jacobian_extremes
from tests.initialization.test_empirical import KINDS, build

WIDTH = 64


def classifier(activation=nn.ReLU, layers=6):
    torch.manual_seed(0)
    hidden = [m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), activation())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if activation is nn.ReLU else "linear")
    return model


def data(count=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, WIDTH, generator=generator), torch.randint(10, (count,), generator=generator)


def report(model, **options):
    x, y = data()
    return og.signal_report(model, x, lambda output: F.cross_entropy(output, y), **options)


def faults(model):
    return {(fault.layer, fault.kind) for fault in report(model).faults}


def test_sound_models_have_no_faults():
    assert faults(classifier()) == set()
    assert faults(classifier(nn.Tanh)) == set()


def test_a_dead_relu_layer_is_named():
    model = classifier()
    with torch.no_grad():
        model[4].bias.fill_(-100.0)
    assert faults(model) == {("5", "dead")}
    assert {row.name: row.dead for row in report(model).layers}["5"] == 1
    half = classifier()
    with torch.no_grad():
        half[4].bias[: WIDTH * 3 // 4] = -100.0
    assert faults(half) == {("5", "dead")}


def test_a_layer_scaled_down_is_named():
    model = classifier()
    with torch.no_grad():
        model[6].weight.mul_(1e-3)
    assert faults(model) == {("6", "shrinks")}


def test_a_saturated_tanh_is_named():
    model = classifier(nn.Tanh)
    with torch.no_grad():
        model[2].bias.copy_(torch.where(torch.arange(WIDTH) % 2 == 0, 9.0, -9.0))
    assert faults(model) == {("3", "saturated")}
    assert {row.name: row.saturated for row in report(model).layers}["3"] > 0.9


def test_all_three_at_once():
    model = nn.Sequential(classifier(layers=4)[:-1], classifier(nn.Tanh, layers=4))
    with torch.no_grad():
        model[0][2].weight.mul_(1e-3)
        model[0][6].bias.fill_(-100.0)
        model[1][4].bias.copy_(torch.where(torch.arange(WIDTH) % 2 == 0, 9.0, -9.0))
    assert faults(model) == {("0.2", "shrinks"), ("0.7", "dead"), ("1.5", "saturated")}


def test_deaths_between_named_layers_are_placed():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

        def forward(self, x):
            return self.second(torch.relu(self.first(x) - 100))

    assert faults(Functional()) == {("first", "dead")}


def test_other_faults_are_named():
    model = classifier()
    with torch.no_grad():
        model[4].weight.mul_(1e3)
    assert faults(model) == {("4", "grows")}
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    assert faults(model) == {("4", "not finite")}
    assert json.loads(report(model, jacobian="none").to_json())["layers"][4]["activation_rms"] is None
    deep = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(60)))
    kinds = {fault.kind for fault in og.signal_report(deep, data()[0]).faults}
    assert "vanishing gradient" in kinds
    explode = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(20)))
    for layer in explode:
        nn.init.orthogonal_(layer.weight, gain=2.0)
    assert {fault.kind for fault in og.signal_report(explode, data()[0]).faults} == {"exploding gradient"}

    class Detached(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).detach())

    assert faults(Detached(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10))) == set()  # no gradient is asked for there


def test_sizes_are_those_of_plain_torch():
    model, (x, y) = classifier(), data()
    found = {row.name: row for row in report(model, learning_rate=0.5).layers}
    hidden = model[:3](x).detach().requires_grad_()
    F.cross_entropy(model[3:](hidden), y).backward()
    row = found["2"]
    assert row.activation_rms == pytest.approx(float(hidden.detach().square().mean().sqrt()), rel=1e-5)
    assert row.activation_mean == pytest.approx(float(hidden.detach().mean()), rel=1e-4)
    assert row.gradient_rms == pytest.approx(float(hidden.grad.square().mean().sqrt()), rel=1e-4)
    assert row.gradient_mean == pytest.approx(float(hidden.grad.mean()), rel=1e-3, abs=1e-9)
    values = torch.linalg.svdvals(model[2].weight.detach())
    assert (row.sigma_max, row.sigma_min) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-4)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    ratio = 0.5 * float(model[2].weight.grad.norm() / model[2].weight.norm())
    assert row.update_ratio == pytest.approx(ratio, rel=1e-4)
    hidden = hidden.detach()
    cosine = F.cosine_similarity(hidden, hidden.roll(1, 0)).mean()
    assert row.correlation == pytest.approx(float(cosine), abs=1e-5)
    before = model[:2](x)
    spreads = [(t - t.mean(0)).square().mean().sqrt().detach() for t in (hidden, before)]
    assert row.gain == pytest.approx(float(spreads[0] / spreads[1]), rel=1e-4)


def test_one_forward_and_one_backward_pass():
    model, runs = classifier(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    report(model, jacobian="none")
    assert len(runs) == 1
    assert report(model, jacobian="none").jacobian is None
    assert report(model, jacobian="model").layers[0].sigma_max is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module_is_reported_and_left_alone(kind):
    torch.manual_seed(3)
    make, get_input = KINDS[kind]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, random = get_input(64), torch.get_rng_state()
    found = og.signal_report(model, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    rows = {row.name.split(" (")[0]: row for row in found.layers}
    weights = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.LSTM | nn.Conv2d)]
    assert set(weights) - {"idle", *(w for w in weights if "out_proj" in w)} <= set(rows)
    assert found.jacobian is None or 0 < found.jacobian.largest < 1e3
    assert found.jacobian is not None or kind == "embedding"
    for row in found.layers:
        assert row.sigma_max is None or row.sigma_max >= row.sigma_min >= 0
    assert str(found)
    json.loads(found.to_json())


def test_wrapped_modules_count_as_one_layer_with_their_scales():
    model = build(lambda: nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 4)))
    x = data()[0]
    og.empirical_init(og.get_wrapped_submodules(model), model, lambda _: x, lambda out: out.mean())
    rows = og.signal_report(model, x).layers
    assert [row.kind for row in rows] == ["Linear", "ReLU", "Linear"]
    assert rows[0].activation_rms == pytest.approx(1, rel=1e-4)
    scaled = float(model[0].activation_scale) * torch.linalg.svdvals(model[0].weight.detach())
    assert (rows[0].sigma_max, rows[0].sigma_min) == pytest.approx((float(scaled[0]), float(scaled[-1])), rel=1e-4)
    assert model[0].gradient_scale != model[0].activation_scale


def test_reused_layers_get_a_row_per_call():
    names = [row.name for row in og.signal_report(KINDS["reused"][0](), torch.randn(16, 32)).layers]
    assert names == ["before", "again", "again (call 2)", "again (call 3)", "after"]


def test_pictures(tmp_path):
    model = classifier()
    with torch.no_grad():
        model[4].bias.fill_(-100.0)
    report(model).plot(tmp_path / "short.png")
    og.signal_report(classifier(layers=20), data()[0]).plot(tmp_path / "long.svg")
    assert (tmp_path / "short.png").stat().st_size > 10_000
    assert (tmp_path / "long.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobian": "all"}, "jacobian must be 'layers', 'model' or 'none', got 'all'"),
        ({"loss": lambda output: output}, r"to one number, got \(64, 10\)"),
        ({"batch": 3}, "must hold a tensor whose first axis counts inputs"),
    ],
    ids=["jacobian", "loss", "batch"],
)
def test_wrong_arguments_are_named(options, message):
    arguments = {"model": classifier(), "batch": data()[0]} | options
    with pytest.raises(ValueError, match=message):
        og.signal_report(**arguments)


# The Jacobian alone.


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("dense", [0, 256])
def test_extremes_are_those_of_the_singular_value_decomposition(shape, dense):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = jacobian_extremes(lambda x: (matrix @ x).tanh(), torch.zeros(shape[1], dtype=torch.float64), 40, dense)
    values = torch.linalg.svdvals(matrix)
    assert found.exact
    assert_close(torch.tensor([found.largest, found.smallest]).double(), values[[0, -1]], rtol=1e-6, atol=1e-9)


def test_thirty_steps_give_four_digits_of_the_largest_and_bound_the_smallest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 600), nn.Tanh(), nn.Linear(600, 500), nn.GELU(), nn.Linear(500, 300)).double()
    x = torch.randn(400, dtype=torch.float64)
    values = torch.linalg.svdvals(torch.autograd.functional.jacobian(model, x))
    found = jacobian_extremes(model, x)
    assert not found.exact
    assert found.largest == pytest.approx(float(values[0]), rel=1e-4)
    assert found.largest <= float(values[0]) * (1 + 1e-9)
    assert found.smallest >= float(values[-1])
    isometry = og.OrthoLinear(400, 400).double()
    found = jacobian_extremes(isometry, x)
    assert (found.largest, found.smallest) == pytest.approx((1, 1), abs=1e-6)


def test_constants_and_in_place_functions():
    assert jacobian_extremes(lambda x: torch.ones(3), torch.ones(2)).largest == 0
    assert jacobian_extremes(lambda x: x.mul_(3.0), torch.ones(300)).largest == pytest.approx(3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        jacobian_extremes(torch.tanh, torch.ones(2), steps=0)
    with pytest.raises(ValueError, match="must map numbers to numbers"):
        jacobian_extremes(lambda x: x[:0], torch.ones(2))
