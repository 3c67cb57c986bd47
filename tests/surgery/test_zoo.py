"""Round trips of ordinary models: convert, train, copy, average, save, load."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthogonium as og
from orthogonium.linalg import orthogonality_defect
from orthogonium.parametrizations import AlmostOrthogonalKernel, StackedBlocks
from tests.helpers import contract
from tests.layers.test_constrain import operator
from tests.operators import allowance, spectrum
from tests.surgery.zoo import ZOO, build


@pytest.fixture(params=ZOO)
def name(request):
    return request.param


def check_bounds(model):
    """Every constrained weight: blocks and matrices orthogonal, convolutions never expand as operators."""
    seen = 0
    for module in model.modules():
        if not is_parametrized(module):
            continue
        for weight_name, (constraint,) in module.parametrizations.items():
            seen += 1
            weight = getattr(module, weight_name).detach()
            if isinstance(module, _ConvNd):
                matrix = operator(module, (4, 4) if max(module.kernel_size) < 5 else (8, 8))
                least = 0.0 if isinstance(constraint.orthogonalizer, AlmostOrthogonalKernel) else 0.9
                assert least <= spectrum(matrix)[-1] <= 1 + allowance(matrix, weight.dtype)
                continue
            if isinstance(constraint.orthogonalizer, StackedBlocks):
                weight = weight.unflatten(0, (constraint.orthogonalizer.plan.blocks, -1))
            assert orthogonality_defect(weight).max() <= contract(weight)
    return seen


@pytest.mark.parametrize("init", ["project", "reset"])
def test_bounds_hold_at_first_and_after_training(name, init):
    model, x = build(name)
    report = og.convert(model, init=init)
    assert len(report.changed) == check_bounds(model) > 0
    assert all(row.detail for row in report.left)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        output = model(x)
        assert torch.isfinite(output).all()
        output.square().mean().backward()
        optimizer.step()
    check_bounds(model)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 2  # a bias in front of batch or layer normalisation may have no gradient


@pytest.mark.parametrize("preset", ["cholesky", "exp"])
def test_every_model_takes_other_presets(name, preset):
    model, x = build(name)
    og.convert(model, og.PRESETS[preset])
    check_bounds(model)
    model(x).sum().backward()


def test_copies_averages_and_state_dicts(name):
    model, x = build(name)
    og.convert(model)
    model.eval()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    average.update_parameters(twin)
    average.update_parameters(twin)
    assert torch.equal(model(x), expected)  # the original is untouched
    assert not torch.equal(average(x), expected)
    check_bounds(average.module)
    other, _ = build(name)
    og.convert(other, init="reset")
    other.eval().load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-5)


def test_converted_models_pickle(name):
    model, x = build(name)
    og.convert(model)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=1e-6)
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]  # tied ones are counted once
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    check_bounds(again)
    assert not torch.equal(again(x), model(x))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(pickle.loads(pickle.dumps(again))(x), model(x), rtol=0, atol=1e-6)


def test_a_checkpoint_of_the_model_as_it_was_loads_and_is_projected(name):
    model, x = build(name)
    state = copy.deepcopy(model.state_dict())
    og.convert(model)
    other, _ = build(name)
    og.convert(other, init="reset")
    other.load_state_dict(state)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=1e-5)


def test_tied_weights_stay_tied():
    model, x = build("lstm")
    report = og.convert(model)
    row = next(row for row in report.rows if row.action == "tied")
    assert (row.name, row.detail) == ("head.weight", "to embedding.weight")
    assert torch.equal(model.head.weight, model.embedding.weight)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    twin(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(twin.head.weight, twin.embedding.weight)
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert isinstance(twin.embedding, nn.Embedding)
