"""Compiled evaluation multiplies by the remembered weight where it lies, and nowhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import orthogonium as og
from tests.helpers import rounding

MAKERS = {
    "OrthoLinear": lambda: og.OrthoLinear(6, 5),
    "UnitNormLinear": lambda: og.UnitNormLinear(6, 5, bias=False),
    "nn.Linear": lambda: og.orthogonal(nn.Linear(6, 5)),
    "large": lambda: og.OrthoLinear(64, 96),  # its copy lies by columns
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
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
def test_values_and_operator(make: Any, leading: tuple[int, ...]) -> None:
    layer = make().eval()
    x = torch.randn(*leading, layer.in_features)
    function, watcher = compiled(layer)
    with torch.no_grad():
        found, again, weight = function(x), function(x), layer.weight
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=rounding(weight))
    assert torch.equal(found, again)
    assert watcher.multiplies
    assert not watcher.copies


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the layout is one for MKL")
def test_the_copy_by_columns_stays_inside() -> None:
    """What the layer hands out lies in memory as before, and is no part of that copy."""
    layer, x = og.OrthoLinear(64, 96).eval(), torch.randn(3, 64)
    with torch.no_grad():
        before = layer.weight
        compiled(layer)[0](x)
        evaluation, position = layer.parametrizations.weight[0]._evaluation[:2]
        factor = evaluation.factor(position)
        assert factor.stride() != before.mT.stride()
        assert torch.equal(factor, before.mT)
        assert layer.weight.stride() == before.stride()
        assert layer.weight.data_ptr() == before.data_ptr()


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


def fused_step(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=True)
    with torch.enable_grad():
        layer(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()


def in_place_step(layer: nn.Module) -> None:
    class Raw(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(torch.randn(parameter.shape))

    Raw(layer.parameters(), {}).step()


def turned_base(layer: nn.Module) -> None:
    layer.parametrizations.weight[0].orthogonalizer.base.neg_()


def transposed(layer: nn.Module) -> None:
    free_of(layer).data = free_of(layer).data.T


def replaced(layer: nn.Module) -> None:
    free_of(layer).data = torch.randn(64, 64)


def written_into(layer: nn.Module) -> None:
    layer.weight.mul_(2.0)


def shared_memory(layer: nn.Module) -> None:
    layer.share_memory()
    compiled(layer)[0](torch.ones(2, 64))
    free_of(layer).data.add_(torch.randn(64, 64))  # as another process would


def free_of(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original


CHANGES = [fused_step, in_place_step, turned_base, transposed, replaced, written_into, shared_memory]


@pytest.mark.parametrize("change", CHANGES)
def test_other_changes(change: Any) -> None:
    """By optimisers and through ``.data``, of the hook's own state, and of the weight that was handed out."""
    preset = og.reparametrizers.EXP_ORTHO_PARAMS if change is turned_base else og.DEFAULT_ORTHO_PARAMS
    layer, x = og.OrthoLinear(64, 64, ortho_params=preset).eval(), torch.randn(3, 64)
    function, _ = compiled(layer)
    with torch.no_grad():
        before = function(x)
        change(layer)
        weight = layer.parametrizations.weight[0].compute(free_of(layer))
        expected = nn.functional.linear(x, weight, layer.bias)
        torch.testing.assert_close(function(x), expected, rtol=0, atol=rounding(weight))
        if change is not written_into:
            assert (expected - before).abs().max() > 0.1


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_of_everything(
    preset: og.OrthoParams, batched: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = og.OrthoLinear(4, 4, ortho_params=preset, dtype=dtype).eval()
    chosen = {name: p for name, p in layer.named_parameters() if any(part in name for part in batched)}
    stacked = {name: torch.randn(3, *value.shape).to(dtype) for name, value in chosen.items()}

    def each(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))

    function, x = torch.func.vmap(each), torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected = function(stacked, x)
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(stacked, x)
    # float32 differs by the matrices; bfloat16 by those and by the roundings of sums of up to 8
    atol = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_a_wrong_size_is_refused() -> None:
    layer = og.OrthoLinear(6, 6).eval()
    function, _ = compiled(layer)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function(torch.randn(3, 5))
