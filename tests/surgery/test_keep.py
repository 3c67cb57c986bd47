"""Weights stay orthogonal under any optimiser."""

import copy
import pickle

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.linalg import NonFiniteError, orthogonality_defect
from tests.helpers import contract


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def step(model, optimizer, scale=1.0):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=generator)
    (scale * (model(x) - 1).square().mean()).backward()
    optimizer.step()


def is_orthogonal(model):
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    return all(bool((orthogonality_defect(w) <= contract(w)).all()) for w in weights)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9),  # far beyond the reach of small corrections
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.5),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
    ],
    ids=["sgd", "adamw", "adam", "rmsprop"],
)
def test_after_every_step_and_no_more_once_removed(make):
    model = network()
    optimizer = make(model.parameters())
    handle = og.keep_orthogonal(model, optimizer)
    assert is_orthogonal(model)  # from the start
    for _ in range(5):
        step(model, optimizer)
        assert is_orthogonal(model)
    assert handle.steps == 5
    assert handle.names == ["0.weight", "2.weight", "4.weight"]
    assert all(drift > 0 for drift in handle.drift.values())
    handle.remove()
    step(model, optimizer)
    assert not is_orthogonal(model)


def test_every_third_step_and_as_a_context():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with og.keep_orthogonal(model, optimizer, every=3, exclude="4"):
        for count in range(1, 7):
            step(model, optimizer)
            assert is_orthogonal(model[:3]) == (count % 3 == 0)
            assert not is_orthogonal(model[4])
    for _ in range(3):
        step(model, optimizer)
    assert not is_orthogonal(model[:3])


def test_survives_the_optimizers_state_dict_and_a_schedule():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    og.keep_orthogonal(model, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer)
    schedule.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    assert is_orthogonal(model)
    state = network().state_dict()  # orthogonal no more, until the next step
    model.load_state_dict(state)
    assert not is_orthogonal(model)
    step(model, optimizer)
    assert is_orthogonal(model)


def test_a_step_that_the_gradient_scaler_skips_changes_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = og.keep_orthogonal(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(value):
        optimizer.zero_grad()
        scaler.scale(value * model(torch.ones(2, 6)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(1.0)
    assert handle.steps == 1
    before = [p.detach().clone() for p in model.parameters()]
    scaled_step(float("inf"))
    assert handle.steps == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    scaled_step(1.0)
    assert handle.steps == 2
    assert is_orthogonal(model)


def test_copies_and_pickles_of_the_optimizer_have_no_hook_as_documented():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    og.keep_orthogonal(model, optimizer)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    step(model2, optimizer2)
    assert not is_orthogonal(model2)
    og.keep_orthogonal(model2, optimizer2)
    step(model2, optimizer2)
    assert is_orthogonal(model2)
    pickle.loads(pickle.dumps(optimizer))
    pickle.loads(pickle.dumps(model))


def test_convolutions_recurrent_and_parametrized_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
            "second": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "lstm": nn.LSTM(4, 5, batch_first=True),
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
            "ours": og.OrthoLinear(5, 2),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    handle = og.keep_orthogonal(model, optimizer)
    assert handle.left == {"ours.weight": "constrained already"}
    x = torch.randn(2, 3, 8, 8)
    for _ in range(4):
        optimizer.zero_grad()
        features = model["second"](model["conv"](x)).flatten(2).mT
        model["ours"](model["norm"](model["lstm"](features)[0])).square().mean().backward()
        optimizer.step()
        for name in ("conv", "second"):
            values = og.singular_values(model[name], (model[name].in_channels, 8, 8))
            assert (values - 1).abs().max() <= 1e-5
        for weight in (model["lstm"].weight_hh_l0, model["lstm"].weight_ih_l0):
            gates = weight.detach().unflatten(0, (4, -1))
            assert (orthogonality_defect(gates) <= contract(gates)).all()
        assert is_orthogonal(model)
    assert min(handle.drift.values()) > 0


def test_only_what_the_optimizer_moves():
    model = network()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    handle = og.keep_orthogonal(model, optimizer)
    assert handle.names == ["4.weight"]
    assert handle.left == {"2.weight": "frozen", "0.weight": "not in this optimizer"}


def test_a_weight_that_blew_up_is_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    og.keep_orthogonal(model, optimizer)
    model[2].weight.grad = torch.full((8, 8), torch.nan)
    with pytest.raises(NonFiniteError, match=r"2\.weight: NaN or Inf"):
        optimizer.step()


def test_half_precision():
    model = network().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    og.keep_orthogonal(model, optimizer)
    model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    weight = model[2].weight.detach()
    assert weight.dtype == torch.bfloat16
    assert orthogonality_defect(weight) <= contract(weight)


def test_refusals():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 0"):
        og.keep_orthogonal(model, optimizer, every=0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
        og.keep_orthogonal(model, "adam")
    with pytest.raises(ValueError, match="nothing to keep orthogonal"):
        og.keep_orthogonal(nn.Sequential(nn.Embedding(3, 3)), optimizer)
    sliced = nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match=r"weight: the parametrization does not give back"):
        og.keep_orthogonal(sliced, torch.optim.SGD(sliced.parameters(), lr=0.1))
