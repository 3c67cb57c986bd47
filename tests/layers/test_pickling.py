"""Pickles and copies of constrained layers are those of ordinary modules: what is attached or shared goes along."""

import copy
import pickle

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.utils.parametrize import remove_parametrizations

from orthogonium.layers import OrthoConv2d, OrthoGRU, OrthoLinear, SkewOrthoConv2d, UnitNormLinear, orthogonal

MAKERS = {
    "linear": lambda: OrthoLinear(4, 4),
    "unit norm": lambda: UnitNormLinear(4, 4),
    "convolution": lambda: OrthoConv2d(4, 4, 3),
    "skew": lambda: SkewOrthoConv2d(4, 4, 3),
    "recurrent": lambda: OrthoGRU(4, 4),
    "torch": lambda: orthogonal(nn.Linear(4, 4)),
}


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.fixture(params=MAKERS)
def layer(request):
    return MAKERS[request.param]()


class Square(OrthoLinear):
    """With arguments of its own."""

    def __init__(self, size, note):
        super().__init__(size, size)
        self.note = note


def doubled(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy, copy.copy])
def test_subclasses_attributes_and_hooks(copied):
    layer = Square(4, note="mine")
    layer.register_forward_hook(doubled)
    twin = copied(layer)
    assert (type(twin).__mro__[1], twin.note) == (Square, "mine")
    assert torch.equal(twin(torch.eye(4)), layer(torch.eye(4)))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_tied_parameters_stay_tied(copied):
    model = nn.ModuleList([OrthoLinear(4, 4), OrthoLinear(4, 4)])
    model[1].bias = model[0].bias
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    twin = copied(model)
    assert twin[1].bias is twin[0].bias is not model[0].bias
    assert twin[1].parametrizations.weight.original is twin[0].parametrizations.weight.original


def test_a_shallow_copy_shares_parameters(layer):
    twin = copy.copy(layer)
    shared = list(zip(twin.parameters(), layer.parameters(), strict=True))
    assert all(mine is its for mine, its in shared)


def test_after_removal(layer):
    for name in list(layer.parametrizations):
        if not hasattr(layer.parametrizations[name], "original1"):
            remove_parametrizations(layer, name)
    twin = pickled(layer)
    assert twin.state_dict().keys() == layer.state_dict().keys()


def _add_one(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_another_process_trains_the_same_parameters(name):
    layer = MAKERS[name]().share_memory()
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    process = multiprocessing.get_context("spawn").Process(target=_add_one, args=(layer,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(parameter, old + 1)
