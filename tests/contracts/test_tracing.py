"""``torch.compile(fullgraph=True)``, ``torch.export`` and the meta device."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from orthogonium.layers import OrthoLinear, UnitNormLinear
from orthogonium.reparametrizers import PRESETS
from tests.helpers import contract, gaussian


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(preset):
    torch.manual_seed(0)
    return nn.Sequential(
        OrthoLinear(6, 8, ortho_params=PRESETS[preset]),
        nn.Tanh(),
        OrthoLinear(8, 8, ortho_params=PRESETS[preset]),
        UnitNormLinear(8, 3),
    )


def step(model, run):
    """A scrambled start, one forward and backward pass: output and gradients."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(gaussian(parameter.shape, dtype=parameter.dtype, seed=number))
    model.zero_grad()
    y = run(gaussian((5, 6), dtype=torch.float32))
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def assert_same(found, expected):
    eps = torch.finfo(torch.float32).eps
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1000 * eps * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("preset", PRESETS)
def test_compile(preset):
    for training in (True, False):
        model = model_of(preset).train(training)
        expected = step(model, model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(step(model, compiled), expected)
        with torch.no_grad():
            assert_same([compiled(torch.ones(5, 6))], [model(torch.ones(5, 6))])


@pytest.mark.parametrize("preset", PRESETS)
def test_operators_stay_outside_of_cuda_graphs(preset):
    """A replay would repeat what they decided once: on a road to the weight, or that the remembered one is current."""
    ours = set()

    def backend(graph, inputs):
        ours.update(node.target for node in graph.graph.nodes if "orthogonium" in str(node.target))
        return graph.forward

    model = model_of(preset)
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))
    compiled(torch.ones(5, 6)).sum().backward()
    of_training = len(ours)
    with torch.no_grad():
        model.eval()
        compiled(torch.ones(5, 6))
    assert 0 < of_training < len(ours)
    assert all(torch.Tag.cudagraph_unsafe in operator.tags for operator in ours)


@pytest.mark.parametrize("preset", ["default", "cholesky"])
def test_compile_with_inductor(preset):
    model = model_of(preset)
    expected = step(model, model)
    assert_same(step(model, torch.compile(model, fullgraph=True)), expected)


class Spoiling(nn.Module):
    """Writes into the weight that it reads."""

    def __init__(self):
        super().__init__()
        self.layer = OrthoLinear(6, 6)

    def forward(self, x, spoil):
        y = x @ self.layer.weight.mT
        if spoil:
            self.layer.weight.mul_(2.0)
        return y


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_evaluation_follows_every_change(backend):
    """Of the free tensor, of the mode, and by compiled code that writes into the weight."""
    model = Spoiling().eval()
    layer, x = model.layer, gaussian((3, 6), dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same([compiled(x, False)], [model(x, False)])
        before = layer.weight
        kept = before.clone()
        for change in (
            lambda: layer.parametrizations.weight.original.add_(gaussian((6, 6), dtype=torch.float32, seed=2)),
            lambda: compiled(x, True),
            lambda: (layer.train(), layer.parametrizations.weight.original.data.neg_(), layer.eval()),
            lambda: layer.load_state_dict(OrthoLinear(6, 6).state_dict()),
        ):
            change()
            expected = x @ layer.parametrizations.weight[0].compute(layer.parametrizations.weight.original).mT
            assert_same([compiled(x, False)], [expected])
        assert torch.equal(before, kept)  # what was read by eager code stays as it was


@pytest.mark.parametrize("preset", PRESETS)
def test_a_compiled_step_trains(preset):
    """Weights follow the free tensor through an optimiser step and stay orthogonal."""
    model = model_of(preset)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (compiled(torch.ones(5, 6)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    weight = model[0].weight
    torch.testing.assert_close(weight.mT @ weight, torch.eye(6), rtol=0, atol=contract(weight))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("preset", PRESETS)
def test_export(preset, strict):
    model = model_of(preset).eval()
    x = gaussian((5, 6), dtype=torch.float32)
    expected = model(x)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_meta_device(preset):
    with torch.device("meta"):
        model = model_of(preset)
    assert all(p.is_meta for p in model.parameters())
    y = model(torch.ones(5, 6, device="meta"))
    y.sum().backward()
    assert y.shape == (5, 3)
    torch.use_deterministic_algorithms(True)  # which fills uninitialised memory with NaN
    try:
        model = model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isnan().all() for p in model.parameters())
    model.load_state_dict(model_of(preset).state_dict())
    assert_same([model(torch.ones(5, 6))], [model_of(preset)(torch.ones(5, 6))])


@pytest.mark.parametrize("preset", PRESETS)
def test_filling_a_meta_layer_by_reset_parameters(preset):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)  # as uninitialised memory may be
    layer.reset_parameters()
    weight = layer.weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(4), rtol=0, atol=contract(weight))
