"""Scales found by running a network: three targets, in one pass, on every kind of module."""

import copy
import io
import json
import pickle
import sys
from math import prod
from statistics import geometric_mean

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import orthogonium as og
from orthogonium.initialization import measure_scales
from orthogonium.linalg import orthogonality_defect

FEATURES = 32
TARGETS = {"activation": (0.9, 1.1), "gradient": (0.85, 1.2), "update": (0.5, 2.0)}  # on other batches of 256


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss(output):
    """A different random direction for every call, like random labels."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum((t.float() * torch.randn_like(t, dtype=torch.float32)).mean() for t in leaves)


def inputs(batch):
    return torch.randn(batch, FEATURES)


def tune(model, get_input=inputs, **options):
    return og.empirical_init(
        og.get_wrapped_submodules(model), model, get_input, loss, **{"batchsz": 256, "generator": seeded()} | options
    )


def measure(model, get_input=inputs, seed=1):
    wrappers = og.get_wrapped_submodules(model)
    return measure_scales(wrappers, model, get_input, loss, 256, generator=seeded(seed))


def assert_of_order_one(reports, targets=TARGETS):
    """Geometric means over reports: updates differ much from one random loss to the next."""
    for rows in zip(*(report.modules for report in reports), strict=True):
        for what, (least, most) in targets.items():
            sizes = [getattr(row, f"{what}_rms") for row in rows]
            assert None in sizes or least < geometric_mean(sizes) < most, (rows[0], what, sizes)


def badly_scaled(layer, factor):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)
    return layer


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 64), nn.Linear(64, FEATURES)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


class Shared(nn.Module):
    """One layer three times in a row, between two others."""

    def __init__(self):
        super().__init__()
        self.before, self.again, self.after = (badly_scaled(nn.Linear(FEATURES, FEATURES), 3.0) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.before(x))
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.after(x)


class TwoHeads(nn.Module):
    """A custom layer with two inputs by keyword, two outputs of different sizes in a dict, and an integer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(30 * torch.randn(FEATURES, 8)), nn.Parameter(0.01 * torch.randn(FEATURES, 8))

    def forward(self, x, *, other):
        return {"large": x @ self.a, "small": (other @ self.b, 3)}


class CallsTwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.heads, self.end = nn.Linear(FEATURES, FEATURES), TwoHeads(), nn.Linear(16, 4)

    def forward(self, x, other):
        found = self.heads(torch.tanh(self.stem(x)), other=other)
        return self.end(torch.cat([found["large"], found["small"][0]], -1))


class Recurrent(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 16, num_layers=2, batch_first=batch_first, dropout=0.3)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        out, (h, _) = self.lstm(x)
        return self.head(out) + self.head(h[-1])[:, None]


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(FEATURES, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for _ in range(4):
            h = self.cell(x, h)
        return self.head(h)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)

    def forward(self, x):
        return self.used(x)


def frozen():
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    model[2].requires_grad_(False)
    return model


def parametrized():
    return nn.Sequential(
        og.OrthoLinear(FEATURES, FEATURES), nn.Tanh(), parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES)),
        nn.Tanh(), parametrizations.spectral_norm(nn.Linear(FEATURES, 4)),
    )  # fmt: skip


def normalized():
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(),
        nn.Linear(64, 4),
    )  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Unflatten(-1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(FEATURES, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def sequences(batch):
    return torch.randn(batch // 8, 8, FEATURES)


KINDS = {
    "normalisation": (normalized, inputs),
    "residual": (lambda: nn.Sequential(Residual(), Residual(), nn.Linear(FEATURES, 4)), inputs),
    "reused": (Shared, inputs),
    "unused": (Unused, inputs),
    "frozen": (frozen, inputs),
    "parametrized": (parametrized, inputs),
    "several inputs, keywords, nested outputs": (CallsTwoHeads, lambda b: (inputs(b), inputs(b))),
    "inputs by keyword": (CallsTwoHeads, lambda b: {"other": inputs(b), "x": inputs(b)}),
    "convolutions, in-place activations": (convolutional, inputs),
    "LSTM": (Recurrent, sequences),
    "cells": (Cells, inputs),
    "transformer": (encoder, sequences),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4)),
        lambda b: torch.randint(50, (b,)),
    ),
}


def build(make):
    torch.manual_seed(3)
    return og.wrap_all_leaf_modules(make())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module_reaches_the_three_targets(kind):
    make, get_input = KINDS[kind]
    model = build(make)
    report = tune(model, get_input)
    assert report.passes <= (4 if kind in {"reused", "cells", "LSTM"} else 1)
    around = 0.2 if report.passes > 1 else 1e-3
    assert_of_order_one([report], dict.fromkeys(TARGETS, (1 - around, 1 + around)))
    assert_of_order_one([measure(model, get_input, seed) for seed in range(1, 8)])
    assert sum(row.update_rms is not None for row in report.modules) >= 1
    json.loads(report.to_json())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_scales_changes(kind):
    make, get_input = KINDS[kind]
    model = build(make)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    tune(model, get_input)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        if not name.endswith("_scale"):
            assert torch.equal(value, before[name]), name
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.02), (torch.float16, 0.1), (torch.bfloat16, 0.2)])
def test_every_type_finds_the_scales_of_float64(dtype, tolerance):
    """The tolerance is the error of a difference at the cube root of the machine precision."""
    scales = []
    for kind in (torch.float64, dtype):
        model = build(
            lambda: nn.Sequential(
                badly_scaled(nn.Linear(FEATURES, 256), 1e-2), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 8)
            )
        ).to(kind)

        def get_input(batch, kind=kind):
            return torch.randn(batch, FEATURES).to(kind)

        tune(model, get_input)
        wrappers = og.get_wrapped_submodules(model)
        assert all(wrapper.activation_scale.dtype == torch.float32 for wrapper in wrappers)
        assert_of_order_one([measure(model, get_input, seed) for seed in (1, 2, 3)])
        scales.append([(float(w.activation_scale), float(w.gradient_scale), float(w.update_scale)) for w in wrappers])
    for exact, found in zip(*scales, strict=True):
        assert found == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("depth", [10, 100])
def test_one_pass_whatever_the_depth(depth, activation):
    layers = [m for _ in range(depth) for m in (badly_scaled(nn.Linear(64, 64), 0.3), activation())]
    model = og.wrap_all_leaf_modules(nn.Sequential(*layers))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    report = tune(model, lambda b: torch.randn(b, 64))
    assert report.passes == len(runs) == 1
    fresh = measure(model, lambda b: torch.randn(b, 64)).extremes()
    assert fresh["activation"][0] > 0.9
    assert fresh["activation"][1] < 1.15


def test_a_step_of_gradient_descent_moves_outputs_by_the_learning_rate():
    """The update target, by an optimiser's own step instead of the function's measurement."""
    model = build(lambda: nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 8)))
    tune(model)
    wrapper, rate = model[0], 1e-2
    torch.manual_seed(7)
    x = inputs(256)
    before = wrapper(x).detach()
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=rate)
    loss(model(x)).backward()
    optimizer.step()
    assert 0.7 < float((wrapper(x).detach() - before).square().mean().sqrt()) / rate < 1.4


def test_scaled_gradients_are_the_true_ones_times_the_scales():
    layer = og.Normed(nn.Linear(3, 2).double())
    layer.set_scales([2.0], [5.0], 7.0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(4, 2, dtype=torch.float64)
    layer(x).backward(cotangent)
    assert_close(layer(x), 2 * layer.module(x))
    assert_close(x.grad, 5 * cotangent @ layer.weight)
    assert_close(layer.module.weight.grad, 35 * cotangent.T @ x)


def test_reproducible_from_a_generator():
    states = []
    for global_seed in (1, 2):
        model = build(normalized)
        torch.manual_seed(global_seed)
        tune(model, redraw=True)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_redraw_draws_weights_and_leaves_gains():
    model = build(normalized)
    with torch.no_grad():
        model[1].weight.fill_(3.0)
        model[3].weight.zero_()
    tune(model, redraw=True)
    assert bool((model[1].weight == 3).all())
    assert float(model[3].weight.std()) == pytest.approx(64**-0.5, rel=0.1)
    assert not model[3].bias.any()


def test_quiet_unless_asked(capsys):
    report = tune(build(frozen))
    assert capsys.readouterr() == ("", "")
    tune(build(frozen), verbose=True)
    assert "update" in capsys.readouterr().out
    assert "frozen" in str(report)
    assert "1 pass," in str(report)


@pytest.mark.parametrize("has_rich", [True, False])
def test_long_runs_on_a_terminal_show_a_bar(has_rich, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    tune(build(frozen))
    assert sys.stderr.getvalue() == ""  # it was quick
    monkeypatch.setattr("orthogonium.initialization.empirical._progress._PATIENCE", 0.0)
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    tune(build(frozen))
    assert "empirical_init" in sys.stderr.getvalue()
    assert ("100 %" in sys.stderr.getvalue()) == (not has_rich)


def test_notes_name_what_could_not_be_tuned():
    notes = {row.name: row.note for row in tune(build(Unused)).modules}
    assert notes == {"used": "", "idle": "not called"}
    dead = nn.Sequential(badly_scaled(nn.Linear(FEATURES, 4), 0.0), nn.ReLU(), nn.Linear(4, 4))
    assert tune(og.wrap_all_leaf_modules(dead)).modules[0].note == "outputs are zero"


def test_chaotic_networks_are_reported():
    def chain(depth, activation):
        torch.manual_seed(0)
        return [m for _ in range(depth) for m in (nn.Linear(FEATURES, FEATURES), activation())]

    (note,) = tune(og.wrap_all_leaf_modules(nn.Sequential(*chain(300, nn.Tanh)))).notes
    assert "chaotic" in note
    assert "criterion='critical'" in note
    assert tune(og.wrap_all_leaf_modules(nn.Sequential(*chain(20, nn.Tanh)))).notes == ()
    assert tune(og.wrap_all_leaf_modules(nn.Sequential(*chain(100, nn.ReLU)))).notes == ()


def test_fast_paths_of_transformers_keep_the_scales():
    model = build(encoder)
    tune(model, sequences)
    x = torch.randn(4, 8, FEATURES)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 5:] = True
    model.eval()
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask).detach()
    assert_close(fast, slow)


def test_decorators_and_models_wrap_alike():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm = Residual(), nn.LayerNorm(FEATURES)
            self.same = self.norm

    class OnInit(Plain):
        @og.wrap_all_leaf_modules
        def __init__(self):
            super().__init__()

    OnClass = og.wrap_all_leaf_modules(type("OnClass", (OnInit,), {}))
    for model in (OnInit(), OnClass(), og.wrap_all_leaf_modules(Plain())):
        assert [type(w.module) for w in og.get_wrapped_submodules(model)] == [nn.Linear, nn.Linear, nn.LayerNorm]
        assert model.same is model.norm
        assert model.block.first.in_features == FEATURES
    assert type(og.wrap_all_leaf_modules(nn.Linear(2, 2))) is og.Normed
    attention = og.wrap_all_leaf_modules(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}))
    assert type(attention["a"].module) is nn.MultiheadAttention


def test_wrappers_copy_save_load_and_assign():
    model = build(CallsTwoHeads)
    x = (inputs(5), inputs(5))
    tune(model, KINDS["inputs by keyword"][1])
    expected = model(*x)
    assert_close(copy.deepcopy(model)(*x), expected, rtol=0, atol=0)
    fresh = build(CallsTwoHeads)
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(*x), expected, rtol=0, atol=0)
    model.stem.weight = nn.Parameter(torch.zeros(FEATURES, FEATURES))
    assert not model.stem.module.weight.any()


def test_wrappers_pickle_and_compile():
    model = build(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    tune(model, lambda b: torch.randn(b, 4))
    x = torch.randn(3, 4, requires_grad=True)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    assert_close(found, expected)
    cotangent = torch.randn_like(found)
    (ours,), (plain,) = (torch.autograd.grad(out, x, cotangent) for out in (found, expected))
    assert_close(ours, plain)


def test_forward_mode_and_batching_pass_through_wrappers():
    model = build(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    tune(model, lambda b: torch.randn(b, 4))
    x = torch.randn(4)
    jacobian = torch.func.jacfwd(model)(x)
    og.fold_scales(model)
    assert_close(jacobian, torch.func.jacrev(model)(x))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in {"parametrized", "LSTM", "cells", "frozen"}])
def test_folding_keeps_outputs_and_leaves_nothing(kind):
    make, get_input = KINDS[kind]
    model = build(make)
    tune(model, get_input)
    model.eval()
    torch.manual_seed(0)
    x = get_input(16)
    run = (lambda m: m(**x)) if isinstance(x, dict) else (lambda m: m(*x) if isinstance(x, tuple) else m(x))
    expected = run(model)
    assert og.fold_scales(model) is model
    left = og.get_wrapped_submodules(model)
    assert [type(w.module) for w in left] == ([TwoHeads] if make is CallsTwoHeads else [])
    assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_folding_leaves_wrappers_where_weights_cannot_hold_a_scale():
    model = build(parametrized)
    tune(model)
    x = inputs(8)
    model.eval()
    expected = model(x)
    og.fold_scales(model)
    assert [model.get_submodule(n) for n in ("0", "4")] == og.get_wrapped_submodules(model)
    assert_close(model(x), expected)
    assert orthogonality_defect(model.get_submodule("0").weight) < 1e-5
    model = build(frozen)
    before = model[2].weight.clone()
    tune(model)
    og.fold_scales(model)
    assert_close(model[2].weight, before, rtol=0, atol=0)
    assert og.get_wrapped_submodules(model) == [model[2]]
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    tied[2].weight = tied[0].weight
    tune(og.wrap_all_leaf_modules(tied), lambda b: torch.randn(b, 8))
    expected = tied(torch.ones(1, 8))
    og.fold_scales(tied)
    assert len(og.get_wrapped_submodules(tied)) == 2
    assert_close(tied(torch.ones(1, 8)), expected)


def test_calibrate_in_one_pass():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for f in (30.0, 1e-3) * 25 for m in (badly_scaled(nn.Linear(64, 64), f), nn.ReLU())))
    directions = [F.normalize(m.weight.detach().flatten(), dim=0) for m in model if isinstance(m, nn.Linear)]
    x, runs = torch.randn(128, 64), []
    model.register_forward_hook(lambda *_: runs.append(1))
    report = og.calibrate(model, x, target=2.0)
    assert len(runs) == report.passes == 1
    for layer, direction in zip([m for m in model if isinstance(m, nn.Linear)], directions, strict=True):
        assert_close(F.normalize(layer.weight.flatten(), dim=0), direction)
        assert layer.weight.requires_grad
    for module in model:
        x = module(x)
        if isinstance(module, nn.Linear):
            assert float(x.square().mean().sqrt()) == pytest.approx(2.0, rel=1e-4)
    assert report.extremes()["activation"] == pytest.approx((2.0, 2.0), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrate_takes_every_kind_and_says_what_it_left(kind):
    make, get_input = KINDS[kind]
    torch.manual_seed(3)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    batch = get_input(256)
    report = og.calibrate(model, batch)
    kept = [row.name for row in report.modules if row.note]
    for name, value in model.state_dict().items():
        if any(name.startswith(f"{prefix}.") for prefix in kept):
            assert torch.equal(value, before[name]), name
    for row in report.modules:
        assert row.note or 0.9 < row.activation_rms < 1.1, row
    again = og.calibrate(model, batch) if kind != "transformer" else None  # dropout draws anew
    for row in again.modules if again else ():
        assert row.note or kind == "LSTM" or prod(row.activation_scale) == pytest.approx(1, abs=0.06), row
    assert og.calibrate(make(), batch, include=lambda name, module: False).extremes().keys() <= {"activation"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wrappers": []}, ValueError, "wrappers is empty"),
        ({"wrappers": [nn.Linear(2, 2)]}, TypeError, "must hold Normed modules, got Linear"),
        ({"batchsz": 0}, ValueError, "batchsz must be at least 1, got 0"),
        ({"test_lr": -1.0}, ValueError, "test_lr must be finite and above 0, got -1.0"),
        ({"get_loss": lambda out: out}, ValueError, r"must return one number, got shape \(64, 4\)"),
        ({"get_loss": lambda out: 1.0}, TypeError, "must return a tensor, got float"),
        ({"get_loss": lambda out: out.detach().sum()}, ValueError, "does not depend on any trainable parameter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    model = build(frozen)
    arguments = {
        "wrappers": og.get_wrapped_submodules(model),
        "forward": model,
        "get_input": inputs,
        "get_loss": loss,
    } | change
    with pytest.raises(error, match=message):
        og.empirical_init(**arguments)
    assert all(wrapper._observer is None for wrapper in og.get_wrapped_submodules(model))


def test_wrapping_twice_is_refused():
    with pytest.raises(ValueError, match="holds wrapped modules already"):
        og.Normed(og.wrap_all_leaf_modules(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="holds Normed modules"):
        og.calibrate(build(frozen), inputs(4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        og.Normed(torch.tanh)
    with pytest.raises(TypeError, match="must be an __init__"):
        og.wrap_all_leaf_modules(3)
    with pytest.raises(ValueError, match="target must be finite and above 0, got 0"):
        og.calibrate(frozen(), inputs(4), target=0)
