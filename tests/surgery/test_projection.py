"""Every weight of an ordinary model becomes its nearest orthogonal matrix."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import orthogonium as og
from orthogonium.linalg import NonFiniteError, orthogonality_defect, polar
from orthogonium.parametrizations import KernelPlan
from orthogonium.parametrizations.kernel import draw_parts
from orthogonium.parametrizations.kernel_projection import nearest_kernel
from tests.helpers import contract, gaussian, polar_reference, rounding


class Zoo(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.lstm = nn.LSTM(8, 6, 2, bidirectional=True, proj_size=4)
        self.gru, self.rnn = nn.GRU(8, 6), nn.RNN(8, 6)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 6), nn.GRUCell(8, 6), nn.RNNCell(8, 6)])
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 4, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(16, 4, 4, stride=2)
        self.line = nn.Conv1d(4, 4, 5)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(8, 5)
        self.twin = nn.Linear(8, 5)
        self.twin.weight = self.linear.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.ours = og.OrthoLinear(4, 4)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    return Zoo()


def matrices_of(name, weight):
    """The matrices that the report's name stands for."""
    if name.startswith(("lstm.weight_ih", "lstm.weight_hh", "cells.0")):
        return weight.unflatten(0, (4, -1))
    if name.startswith(("gru", "cells.1")):
        return weight.unflatten(0, (3, -1))
    if name.startswith("attention.in_proj"):
        return weight.unflatten(0, (6, -1))  # queries, keys and values of two heads
    if name.startswith(("cross.q_", "cross.k_", "cross.v_")):
        return weight.unflatten(0, (2, -1))
    return weight[None]


def test_every_matrix_is_its_polar_factor_gate_by_gate(zoo):
    before = {name: p.detach().clone() for name, p in zoo.named_parameters(remove_duplicate=False)}
    report = og.orthogonalize_model(zoo)
    after = dict(zoo.named_parameters(remove_duplicate=False))
    for name in report.drift:
        if before[name].ndim == 2:
            old, new = matrices_of(name, before[name]), matrices_of(name, after[name].detach())
            assert_close(new.double(), polar_reference(old), rtol=0, atol=2 * rounding(old), msg=name)
            drift = (old - new).norm() / new.norm()
            assert report.drift[name] == pytest.approx(drift.item(), rel=1e-4), name
    recurrent = {n for n in before if n.split(".")[0] in ("lstm", "gru", "rnn", "cells") and before[n].ndim > 1}
    attention = {n for n in before if n.split(".")[0] in ("attention", "cross") and before[n].ndim > 1}
    convolutions = {"conv.weight", "down.weight", "up.weight", "line.weight"}
    assert set(report.drift) == recurrent | attention | convolutions | {"linear.weight"}
    untouched = set(before) - set(report.drift) - {"twin.weight"}
    for name in untouched:
        assert torch.equal(after[name], before[name]), name
    assert report.left == {
        "embedding.weight": "an embedding",
        "head.weight": "tied to embedding.weight",
        "frozen.weight": "frozen",
        "ours.weight": "constrained already",
    }
    assert zoo.twin.weight is zoo.linear.weight
    assert all(line.split("  ")[0].strip() in str(report) for line in report.drift)


def test_twice_changes_nothing_more_and_records_nothing(zoo):
    og.orthogonalize_model(zoo)
    report = og.orthogonalize_model(zoo)
    assert max(report.drift.values()) <= 1e-6
    assert all(p.grad_fn is None and p.grad is None for p in zoo.parameters())
    assert zoo.linear.weight.requires_grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_become_orthogonal_as_operators(stride, transposed):
    torch.manual_seed(0)
    if transposed:
        layer = nn.ConvTranspose2d(6, 4, 4, stride=stride)
        twin = nn.Conv2d(4, 6, 4, stride=stride, padding=0, bias=False)  # its adjoint
    else:
        layer = twin = nn.Conv2d(4, 6, 4, stride=stride, bias=False)
    og.orthogonalize_model(layer)
    holder = og.OrthoConv2d(4, 6, 4, stride=stride, bias=False)  # the same kernel under circular padding
    holder.weight = layer.weight.detach()
    assert_close(holder.weight.detach(), layer.weight.detach(), rtol=0, atol=1e-5)
    assert (og.singular_values(holder, (4, 8, 8)) - 1).abs().max() <= 1e-5
    assert twin.weight.shape == layer.weight.shape


def test_the_nearest_kernel_is_nearer_than_what_was_there_and_than_neighbours():
    plan = KernelPlan(6, 4, (3, 3), (1, 1))
    generator = torch.Generator().manual_seed(0)
    target = 0.3 * torch.randn(plan.weight_shape, generator=generator, dtype=torch.float64)
    kernel, frames = nearest_kernel(plan, target)
    for _ in range(200):  # where a call stops, progress is slow; the next one goes on
        kernel, frames = nearest_kernel(plan, target, frames)
    first, taken = plan.take_apart(target)
    greedy = plan.assemble(polar(first), taken)
    found = (kernel - target).norm()
    assert found < 0.99 * (greedy - target).norm()
    for seed in range(20):  # no neighbour is nearer: a local minimum
        for size in (1e-3, 1e-2):
            noise = size * gaussian(tuple(frames.shape), seed=seed)
            near = og.linalg.qr_orthogonalize(frames + noise)
            from_near = nearest_kernel(plan, target, near, sweeps=0)[0]
            assert (from_near - target).norm() >= found * (1 - 1e-6)
    again = nearest_kernel(plan, kernel)[0]
    assert_close(again, kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        KernelPlan(4, 4, (3,), (1,)),
        KernelPlan(8, 3, (3, 2), (1, 1)),
        KernelPlan(3, 8, (3, 3), (1, 1), groups=2),
        KernelPlan(8, 4, (4, 4), (2, 2)),
        KernelPlan(32, 4, (3, 3), (2, 2)),
        KernelPlan(4, 4, (2, 2, 2), (1, 1, 1)),
        KernelPlan(8, 2, (2, 2), (2, 2), groups=3),
    ],
    ids=str,
)
def test_a_slightly_moved_kernel_moves_back(plan):
    kernel = plan.assemble(*draw_parts(plan, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    noise = gaussian(tuple(kernel.shape), seed=1)
    noise *= 1e-3 * kernel.norm() / noise.norm()
    assert_close(nearest_kernel(plan, kernel)[0], kernel, rtol=0, atol=1e-11)
    found = nearest_kernel(plan, kernel + noise)[0]
    assert (found - kernel - noise).norm() < noise.norm()  # strictly nearer than where it came from
    frames = draw_parts(plan, dtype=torch.float64)[1]
    if frames is not None:
        start = nearest_kernel(plan, kernel)[1]
        warm = nearest_kernel(plan, kernel + noise, start)[0]
        assert (warm - kernel - noise).norm() < noise.norm()


@pytest.mark.parametrize("shape", [(4, 32), (3, 16), (4, 8)], ids=str)
def test_a_strided_kernel_that_feeds_a_part_of_its_channels_can_be_assigned_to_itself(shape):
    torch.manual_seed(0)
    layer = og.OrthoConv2d(*shape, 3, stride=2).double()
    weight = layer.weight.detach().clone()
    layer.weight = weight
    assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-9)


def test_delta_and_reshape():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2)
    centre = layer.weight.detach()[:, :, 1, 1].unflatten(0, (2, 3))
    whole = layer.weight.detach().flatten(1).unflatten(0, (2, 3))
    delta, reshaped = copy.deepcopy(layer), copy.deepcopy(layer)
    og.orthogonalize_model(delta, conv="delta")
    assert_close(delta.weight.detach()[:, :, 1, 1].unflatten(0, (2, 3)), polar(centre))
    assert delta.weight.count_nonzero() == 12
    og.orthogonalize_model(reshaped, conv="reshape")
    assert_close(reshaped.weight.detach().flatten(1).unflatten(0, (2, 3)), polar(whole))


def test_kernels_that_cannot_be_orthogonal_are_left_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1, stride=2))
    report = og.orthogonalize_model(model)
    assert report.drift == {}
    assert "signed shifts" in report.left["0.weight"]
    assert "room for 8 channels" in report.left["1.weight"]


def test_filters(zoo):
    everything = set(og.orthogonalize_model(copy.deepcopy(zoo)).drift)
    by_name = og.orthogonalize_model(copy.deepcopy(zoo), include="*.weight_hh*")
    assert set(by_name.drift) == {n for n in everything if "weight_hh" in n}
    by_module = og.orthogonalize_model(copy.deepcopy(zoo), include=["lstm", "conv"], exclude="*_l1*")
    assert set(by_module.drift) == {n for n in everything if n.startswith(("lstm.", "conv.")) and "_l1" not in n}
    by_function = og.orthogonalize_model(copy.deepcopy(zoo), exclude=lambda path, m: not isinstance(m, nn.GRU))
    assert set(by_function.drift) == {n for n in everything if n.startswith("gru.")}
    with pytest.raises(ValueError, match=r"include='lstn\*' matches no weight of Zoo"):
        og.orthogonalize_model(zoo, include="lstn*")
    with pytest.raises(TypeError, match="patterns or a function"):
        og.orthogonalize_model(zoo, include=[3])
    with pytest.raises(ValueError, match="'kernel', 'delta', 'reshape', got 'flat'"):
        og.orthogonalize_model(zoo, conv="flat")
    assert "frozen.weight" in og.orthogonalize_model(zoo, frozen=True).drift


def test_other_parametrizations_are_set_through_or_left(zoo):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "weight_norm": parametrizations.weight_norm(nn.Linear(5, 7)),
            "spectral": parametrizations.spectral_norm(nn.Linear(5, 7)),
            "exponential": parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="matrix_exp"),
            "slices": parametrizations.orthogonal(nn.Conv2d(3, 8, 3)),
        }
    )
    expected = {name: polar_reference(model[name].weight.detach()) for name in ("weight_norm", "spectral")}
    slices = model["slices"].weight.detach().clone()
    report = og.orthogonalize_model(model)
    for name, reference in expected.items():
        for training in (True, False, True):
            found = model[name].train(training).weight.detach().double()
            assert_close(found, reference, rtol=0, atol=1e-5, msg=name)
    assert report.drift["exponential.weight"] <= 1e-5
    assert "does not give back" in report.left["slices.weight"]
    assert torch.equal(model["slices"].weight, slices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(4, 4, 3)).to(dtype)
    wide = copy.deepcopy(model).to(torch.float32 if dtype != torch.float64 else dtype)
    og.orthogonalize_model(model)
    og.orthogonalize_model(wide)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype))


def test_weights_of_one_shape_are_projected_together(monkeypatch):
    calls = []
    import orthogonium.surgery.projection as room

    monkeypatch.setattr(room, "polar_after_step", lambda stack: calls.append(tuple(stack.shape)) or polar(stack))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 2), nn.RNN(4, 4))
    og.orthogonalize_model(model)
    assert sorted(calls) == [(1, 2, 4), (7, 4, 4)]


def test_all_or_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 3), nn.Conv2d(2, 2, 3))
    for broken in (1, 2):
        trial = copy.deepcopy(model)
        trial[broken].weight.data.view(-1)[0] = torch.nan
        before = trial[0].weight.detach().clone()
        with pytest.raises(NonFiniteError, match=rf"^{broken}\.weight: NaN or Inf"):
            og.orthogonalize_model(trial)
        assert torch.equal(trial[0].weight, before)


def test_weights_without_entries_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        og.orthogonalize_model(model)
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        og.orthogonalize_model(nn.Sequential(nn.LazyLinear(3)))
    assert og.orthogonalize_model(nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2)), exclude="0").drift


def test_large_groups_are_split(monkeypatch):
    import orthogonium.surgery.projection as room

    monkeypatch.setattr(room, "_STACK", 40)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), *(nn.Conv1d(2, 2, 3) for _ in range(5)))
    report = og.orthogonalize_model(model)
    assert len(report.drift) == 10
    for layer in model[:5]:
        assert orthogonality_defect(layer.weight.detach()) <= contract(layer.weight)


def test_what_is_projected_is_what_convert_constrains(zoo):
    """One idea of blocks: a projected model is a fixed point of the conversion."""
    drift = og.orthogonalize_model(zoo).drift
    before = {name: p.detach().clone() for name, p in zoo.named_parameters()}
    report = og.convert(zoo, exclude=["embedding", "head"])
    moved = {row.name: row.distance for row in report.changed if row.distance is not None}
    assert set(moved) == set(drift)
    assert max(moved.values()) < 1e-5, {name: d for name, d in moved.items() if d >= 1e-5}
    assert_close(zoo.attention.in_proj_weight, before["attention.in_proj_weight"], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_parts_of_a_weight_that_a_hook_computes_are_left_alone():
    """Projecting them would promise an orthogonal weight and give another."""
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.3)
    normed, recurrent = nn.utils.weight_norm(nn.Linear(4, 4)), nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    model = nn.ModuleDict({"pruned": pruned, "normed": normed, "recurrent": recurrent})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = og.orthogonalize_model(model)
    parts = {"pruned.weight_orig", "normed.weight_g", "normed.weight_v"}
    parts |= {"recurrent.weight_hh_l0_g", "recurrent.weight_hh_l0_v"}
    assert set(report.drift) == {"recurrent.weight_ih_l0"}
    assert set(report.left) == parts
    assert all("only a part of a weight" in report.left[name] for name in parts)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in parts)
