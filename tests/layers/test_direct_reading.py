"""The short way to a weight is taken only where nobody could tell the difference."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.utils import parametrize

import orthogonium as og


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return og.OrthoConv2d(4, 4, 3).eval()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def targets(layer: Any) -> list[nn.Module]:
    listing = layer.parametrizations.weight
    return [listing, listing[0]]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_way_are_called(layer: nn.Module, which: int, register: str) -> None:
    calls: list[int] = []
    getattr(targets(layer)[which], register)(lambda *args: calls.append(1))
    _ = layer.weight
    assert calls == [1]


def test_a_global_hook_sees_every_module(layer: nn.Module) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        _ = layer.weight
    finally:
        handle.remove()
    assert all(target in seen for target in targets(layer))


@pytest.mark.parametrize("which", [0, 1])
def test_a_replaced_forward_is_called(layer: nn.Module, which: int) -> None:
    target: Any = targets(layer)[which]
    target.forward = lambda *free: torch.ones(1)
    assert torch.equal(layer.weight, torch.ones(1))


def test_a_second_parametrization_acts(layer: nn.Module) -> None:
    before = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer.weight, 2 * before, rtol=0, atol=0)


def test_torch_caches_as_ever(layer: nn.Module) -> None:
    with torch.no_grad(), parametrize.cached():
        assert layer.weight is layer.weight
    with torch.no_grad():
        assert layer.weight is not layer.weight


def test_symbolic_tracing_does_not_freeze_the_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(og.OrthoLinear(4, 4), nn.ReLU()).eval()
    traced = symbolic_trace(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.randn(4, 4))
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


def test_removal_and_a_new_constraint(layer: Any) -> None:
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert isinstance(layer.weight, nn.Parameter)
    og.orthogonal(layer)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-6)


def test_both_ways_give_the_same(layer: Any) -> None:
    short = layer.weight
    handle = layer.parametrizations.weight.register_forward_hook(lambda *args: None)
    long = layer.weight
    handle.remove()
    assert torch.equal(short, long)
