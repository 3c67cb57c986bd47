"""Learning rates by layer, and whether widths agree."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.diagnostics.layerwise_lr import update_sizes
from tests.initialization.test_empirical import KINDS

WIDTHS = [64, 256, 1024]
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 32, generator=GENERATOR), torch.randint(10, (64,), generator=GENERATOR)


def loss(output):
    return F.cross_entropy(output, Y)


def mlp(width):
    return nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def step_changes(model, groups):
    """By layer, how far one step of Adam moves its outputs, inputs being held: by the optimiser itself."""
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    loss(model(X)).backward()
    inputs = dict(inputs)
    before = {name: model.get_submodule(name)(x).detach() for name, x in inputs.items()}
    optimizer.step()
    return {
        name: float((model.get_submodule(name)(x) - before[name]).square().mean().sqrt()) for name, x in inputs.items()
    }


def test_steps_grow_with_width_at_one_rate_and_not_with_measured_ones():
    plain, measured = {}, {}
    for width in WIDTHS:
        torch.manual_seed(0)
        model = mlp(width)
        plain[width] = step_changes(model, model.parameters())
        torch.manual_seed(0)
        model = mlp(width)
        measured[width] = step_changes(model, og.layerwise_lr(model, X, loss, change=0.01))
    for layer in ("2", "4", "6"):
        assert plain[1024][layer] / plain[64][layer] > 2.4
    for width in WIDTHS:
        for layer, change in measured[width].items():
            assert change == pytest.approx(0.01, rel=0.04), (width, layer)


def test_rates_of_hidden_layers_fall_like_one_over_width():
    rates = []
    for width in (128, 1024):
        torch.manual_seed(0)
        model = mlp(width)
        rates.append({group["name"]: group["lr"] for group in og.layerwise_lr(model, X, loss)})
    for layer in ("2", "4"):
        assert rates[0][layer] / rates[1][layer] == pytest.approx(8, rel=0.25)
    assert rates[0]["0"] / rates[1]["0"] == pytest.approx(1, rel=0.1)


def test_plain_gradient_descent():
    torch.manual_seed(0)
    model = mlp(64).double()
    x = X.double()
    (group,) = [g for g in og.layerwise_lr(model, x, loss, change=1e-4, optimizer="sgd") if g["name"] == "2"]
    hidden = model[:2](x).detach()
    before = model[2](hidden).detach()
    loss(model(x)).backward()
    torch.optim.SGD(group["params"], lr=group["lr"]).step()
    assert float((model[2](hidden) - before).square().mean().sqrt()) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "inputs by keyword"])
def test_groups_hold_every_trainable_parameter_once(kind):
    torch.manual_seed(0)
    make, get_input = KINDS[kind]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = og.layerwise_lr(model, get_input(64))
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(0 < group["lr"] < math.inf for group in groups)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.optim.AdamW(groups)


def test_sizes_do_not_depend_on_a_frozen_bias():
    model = mlp(16)
    model[2].bias.requires_grad_(False)
    assert model[2] in update_sizes(model, X, loss)
    model[2].weight.requires_grad_(False)
    assert model[2] not in update_sizes(model, X, loss)


def test_coordinate_check_tells_the_two_apart(tmp_path):
    plain = og.coordinate_check(mlp, WIDTHS, X, loss, steps=2)
    rated = og.coordinate_check(
        mlp, WIDTHS, X, loss, steps=2, optimizer=lambda model: torch.optim.Adam(og.layerwise_lr(model, X, loss))
    )
    for layer in ("2", "4"):
        assert plain.exponents()[layer] > 0.5
        assert abs(rated.exponents()[layer]) < 0.1
    assert "∝ width^" in str(plain)
    assert set(json.loads(plain.to_json())) == {"steps", "coordinates", "exponents"}
    plain.plot(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 10_000


def test_coordinate_check_needs_no_batch_after_a_linear_layer():
    random = torch.get_rng_state()
    found = og.coordinate_check(mlp, [8, 16], seeds=(0, 1))
    assert torch.equal(torch.get_rng_state(), random)
    assert [(c.width, c.layer) for c in found.coordinates[:5]] == [(8, "0"), (8, "2"), (8, "4"), (8, "6"), (16, "0")]
    assert all(c.change_rms > 0 for c in found.coordinates)
    assert found == og.coordinate_check(mlp, [8, 16], seeds=(0, 1))
    still = og.coordinate_check(mlp, [8, 16], optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert all(math.isnan(p) for p in still.exponents().values())
    assert set(json.loads(still.to_json())["exponents"].values()) == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_measuring_on_a_gpu_leaves_its_random_state_alone():
    def with_dropout(width):
        return nn.Sequential(nn.Linear(32, width), nn.Dropout(0.5), nn.Linear(width, 10)).cuda()

    x, model = X.cuda(), with_dropout(8)
    before = torch.cuda.get_rng_state()
    og.coordinate_check(with_dropout, [8, 16], x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    og.signal_report(model, x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    og.layerwise_lr(model, x)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("name", ["widths", "seeds"])
def test_one_number_where_several_belong_is_named(name):
    arguments = {"widths": [8, 16], "seeds": (0,)} | {name: 3}
    with pytest.raises(TypeError, match=f"{name} must be a list of integers, got 3"):
        og.coordinate_check(mlp, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: og.coordinate_check(mlp, [8]), "at least two different widths"),
        (lambda: og.coordinate_check(mlp, [8, 16], steps=0), "steps must be at least 1, got 0"),
        (lambda: og.coordinate_check(mlp, [8, 16], seeds=()), "at least one seed"),
        (
            lambda: og.coordinate_check(lambda w: nn.Conv1d(2, w, 3), [8, 16]),
            "batch is needed: .* begins with Conv1d",
        ),
        (lambda: og.layerwise_lr(mlp(8), X, optimizer="lbfgs"), "must be 'adam' or 'sgd', got 'lbfgs'"),
        (lambda: og.layerwise_lr(mlp(8), X, change=0.0), "change must be finite and above 0"),
        (lambda: og.layerwise_lr(mlp(8), X, lambda out: (0 * out).sum()), "no layer gets a gradient"),
    ],
    ids=range(7),
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
