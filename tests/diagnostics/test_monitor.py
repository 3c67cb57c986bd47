"""What the monitor logs is true, and training does not notice it."""

import itertools
import math

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.linalg import orthogonality_defect


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(),
        og.OrthoConv2d(8, 8, 3, stride=2), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Flatten(),
        nn.Linear(8 * 64, 160), nn.ReLU(), og.OrthoLinear(160, 160), nn.Linear(160, 10),
    )  # fmt: skip


def train(network, steps, **options):
    records = []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    monitor = og.SpectralMonitor(network, lambda step, values: records.append((step, values)), optimizer, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return records, monitor


def test_training_is_not_changed():
    watched, alone = model(), model()
    train(watched, 5, every=1)
    records, monitor = train(alone, 0)
    monitor.remove()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        alone(torch.randn(8, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    assert records == []
    for one, other in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_values_are_those_of_the_weights():
    network = model()
    records, monitor = train(network, 41, every=10, exact=200)
    assert [step for step, _ in records] == [0, 10, 20, 30, 40]
    values = monitor.record()  # after the last step
    for name in ("6", "8", "9"):
        weight = network.get_submodule(name).weight.detach()
        singular = torch.linalg.svdvals(weight.double())
        assert values[f"{name}/sigma_max"] == pytest.approx(float(singular[0]), rel=1e-5)
        assert values[f"{name}/sigma_min"] == pytest.approx(float(singular[-1]), rel=1e-4)
        assert values[f"{name}/defect"] == pytest.approx(float(orthogonality_defect(weight)), rel=1e-4, abs=1e-5)
        count = sum(p.grad.numel() for p in network.get_submodule(name).parameters())
        squares = sum(float(p.grad.square().sum()) for p in network.get_submodule(name).parameters())
        assert values[f"{name}/gradient"] == pytest.approx((squares / count) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["0", "3"])
def test_convolutions_are_measured_as_operators(name):
    network = model()
    _, monitor = train(network, 60, every=2)
    values = monitor.record()
    shape = {"0": (3, 8, 8), "3": (8, 8, 8)}[name]
    exact = og.singular_values(network.get_submodule(name), shape)
    most, least = values[f"{name}/sigma_max"], values[f"{name}/sigma_min"]
    assert float(exact[0]) * 0.99 <= most <= float(exact[0]) * (1 + 1e-5)
    assert float(exact[-1]) * (1 - 1e-5) <= least <= float(exact[-1]) * 1.2
    assert values[f"{name}/defect"] <= float((exact.square() - 1).abs().max()) + 1e-5


def test_estimates_of_large_matrices_err_to_the_side_they_say_and_improve():
    network = nn.Linear(300, 300, bias=False)
    singular = torch.linalg.svdvals(network.weight.detach().double())
    monitor = og.SpectralMonitor(network, lambda *_: None)
    found = [monitor.record() for _ in range(30)]
    largest = [values["model/sigma_max"] for values in found]
    assert all(a <= b * (1 + 1e-6) for a, b in itertools.pairwise(largest))
    assert largest[-1] <= float(singular[0]) * (1 + 1e-5)
    assert largest[-1] == pytest.approx(float(singular[0]), rel=1e-3)
    assert found[0]["model/sigma_min"] > found[-1]["model/sigma_min"] >= float(singular[-1]) - 1e-4


def test_writers_and_handles():
    class Writer:
        def __init__(self):
            self.seen = []

        def add_scalar(self, tag, value, step):
            self.seen.append((tag, value, step))

    writer, network = Writer(), nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with og.SpectralMonitor(network, writer, optimizer, every=2):
        for _ in range(3):
            network(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    assert {(tag, step) for tag, _, step in writer.seen} == {
        (f"0/{what}", step) for what in ("sigma_max", "sigma_min", "defect", "gradient") for step in (0, 2)
    }
    seen = len(writer.seen)
    optimizer.step()
    assert len(writer.seen) == seen
    assert not network[0]._forward_pre_hooks


def test_diverged_weights_are_logged_as_such():
    network = nn.Linear(4, 300)
    with torch.no_grad():
        network.weight.fill_(torch.nan)
    for exact in (128, 1):
        values = og.SpectralMonitor(network, lambda *_: None, exact=exact).record()
        assert math.isnan(values["model/sigma_max"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log": 3}, TypeError, "log must be callable or have add_scalar, got int"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"model": nn.ReLU()}, ValueError, "holds no linear layer"),
    ],
    ids=["log", "every", "iterations", "model"],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        og.SpectralMonitor(**({"model": nn.Linear(2, 2), "log": print} | arguments))
