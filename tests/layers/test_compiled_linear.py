"""Compiled evaluation multiplies by the remembered weight where it lies, and nowhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthogonium as og

MAKERS = {
    "OrthoLinear": lambda: og.OrthoLinear(6, 5),
    "UnitNormLinear": lambda: og.UnitNormLinear(6, 5, bias=False),
    "nn.Linear": lambda: og.orthogonal(nn.Linear(6, 5)),
}


class Watcher:
    """A backend that lists the operators of each graph that it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.seen += [str(node.target) for node in graph.graph.nodes]
        return graph.forward

    @property
    def copies(self) -> bool:
        return any(name.endswith(("remembered", "remembered.default")) for name in self.seen)

    @property
    def multiplies(self) -> bool:
        return any("remembered_product" in name for name in self.seen)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def compiled(layer: nn.Module) -> tuple[Any, Watcher]:
    watcher = Watcher()
    return torch.compile(layer, fullgraph=True, backend=watcher), watcher


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
def test_values_and_operator(make: Any, shape: tuple[int, ...]) -> None:
    layer, x = make().eval(), torch.randn(shape)
    function, watcher = compiled(layer)
    with torch.no_grad():
        assert torch.equal(function(x), layer(x))
    assert watcher.multiplies
    assert not watcher.copies


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_change_is_followed(backend: str) -> None:
    model = nn.Sequential(og.OrthoLinear(6, 6), og.MaxMin(), og.OrthoLinear(6, 4)).eval()
    function, x = torch.compile(model, fullgraph=True, backend=backend), torch.randn(3, 6)
    free = model[0].parametrizations.weight.original
    with torch.no_grad():
        for change in (lambda: None, lambda: free.add_(torch.randn(6, 6)), lambda: free.neg_()):
            change()
            weight = model[0].parametrizations.weight[0].compute(free)
            expected = model[2](model[1](nn.functional.linear(x, weight, model[0].bias)))
            torch.testing.assert_close(function(x), expected, rtol=0, atol=1e-6)
    other = torch.randn(5, 6)
    with torch.inference_mode():
        torch.testing.assert_close(function(other), model(other), rtol=0, atol=1e-6)


def test_gradients_of_the_input_in_evaluation() -> None:
    layer = og.OrthoLinear(6, 6).eval().requires_grad_(False)
    function, watcher = compiled(layer)
    x = torch.randn(3, 6, requires_grad=True)
    found = torch.autograd.grad(function(x).square().sum(), x)[0]
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)
    assert not watcher.multiplies


def test_training_computes_anew() -> None:
    layer = og.OrthoLinear(6, 6).train()
    function, watcher = compiled(layer)
    with torch.no_grad():
        function(torch.randn(3, 6))
    assert not watcher.multiplies
    assert not watcher.copies


def test_autocast_has_its_dtype() -> None:
    layer, x = og.OrthoLinear(6, 6).eval(), torch.randn(3, 6)
    function, _ = compiled(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = function(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_second_parametrization_acts() -> None:
    layer, x = og.OrthoLinear(6, 6).eval(), torch.randn(3, 6)
    parametrize.register_parametrization(layer, "weight", Doubled())
    function, watcher = compiled(layer)
    with torch.no_grad():
        torch.testing.assert_close(function(x), layer(x))
    assert not watcher.multiplies


def test_a_subclass_with_its_own_forward_keeps_it() -> None:
    class Shifted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    layer, x = og.orthogonal(Shifted(6, 6)).eval(), torch.randn(3, 6)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    function, _ = compiled(layer)
    with torch.no_grad():
        torch.testing.assert_close(function(x), plain + 1)
        torch.testing.assert_close(layer(x), plain + 1)


BATCHED = [("weight", "bias"), ("weight",), ("bias",), ()]


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
@pytest.mark.parametrize("batched", BATCHED, ids=["both", "weights", "biases", "inputs"])
@pytest.mark.parametrize("preset", [og.DEFAULT_ORTHO_PARAMS, og.CHOLESKY_ORTHO_PARAMS], ids=["default", "cholesky"])
def test_batches_of_everything(preset: og.OrthoParams, batched: tuple[str, ...], shape: tuple[int, ...]) -> None:
    layer = og.OrthoLinear(4, 4, ortho_params=preset).eval()
    chosen = {name: p for name, p in layer.named_parameters() if any(part in name for part in batched)}
    stacked = {name: torch.randn(3, *value.shape) for name, value in chosen.items()}

    def each(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    function, x = torch.func.vmap(each), torch.randn(shape)
    with torch.no_grad():
        expected = function(stacked, x)
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(stacked, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_wrong_size_is_refused() -> None:
    layer = og.OrthoLinear(6, 6).eval()
    function, _ = compiled(layer)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function(torch.randn(3, 5))
