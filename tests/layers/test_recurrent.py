import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

import orthogonium as og
from orthogonium.layers import orthogonal
from orthogonium.linalg import orthogonality_defect
from orthogonium.reparametrizers import EXP_ORTHO_PARAMS
from tests.helpers import contract

KINDS = {
    "rnn": (nn.RNN, og.OrthoRNN, 1, {}),
    "lstm": (nn.LSTM, og.OrthoLSTM, 4, {}),
    "lstm_projected": (nn.LSTM, og.OrthoLSTM, 4, {"proj_size": 3}),
    "gru": (nn.GRU, og.OrthoGRU, 3, {}),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def weights(module):
    return [name for name in module._flat_weights_names if name.startswith("weight")]


def blocks(module, name, gates):
    return getattr(module, name).detach().unflatten(0, (1 if "hr" in name else gates, -1))


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def constrained(kind, **more):
    plain, _, _, arguments = kind
    torch.manual_seed(0)
    module = plain(5, 6, num_layers=2, bidirectional=True, batch_first=True, **arguments, **more)
    reference = copy.deepcopy(module)
    for name in weights(module):
        orthogonal(module, name)
    return module, reference


def test_each_gate_of_each_layer_and_direction_becomes_its_nearest_orthogonal_matrix(kind):
    module, reference = constrained(kind)
    for name in weights(module):
        found, given = blocks(module, name, kind[2]), blocks(reference, name, kind[2])
        assert orthogonality_defect(found).max() <= contract(found)
        u, _, vh = torch.linalg.svd(given.double(), full_matrices=False)
        torch.testing.assert_close(found.double(), u @ vh, rtol=0, atol=2e-6)


def test_the_kernels_compute_with_the_constrained_weights(kind):
    module, reference = constrained(kind)
    with torch.no_grad():
        for name in weights(module):
            getattr(reference, name).copy_(getattr(module, name))
    x = torch.randn(3, 7, 5)
    for _ in range(2):
        torch.testing.assert_close(module(x)[0], reference(x)[0], rtol=0, atol=1e-6)
        module.eval(), reference.eval()


def test_training_moves_every_tensor_and_keeps_gates_orthogonal(kind):
    module, _ = constrained(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    x = torch.randn(3, 7, 5)
    before = [p.detach().clone() for p in module.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        module(x)[0].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    for name in weights(module):
        found = blocks(module, name, kind[2])
        assert orthogonality_defect(found).max() <= contract(found)


def test_copies_are_independent_and_state_dicts_travel(kind):
    module, reference = constrained(kind)
    x = torch.randn(3, 7, 5)
    output = module(x)[0]
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x)[0], output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(module(x)[0], output)
    assert not torch.equal(twin(x)[0], output)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x)[0], output)
    twin.load_state_dict(reference.state_dict())  # of the unconstrained module: projected again
    torch.testing.assert_close(twin(x)[0], output, rtol=0, atol=1e-6)


def test_removal_leaves_the_torch_module_with_its_weights(kind):
    module, _ = constrained(kind)
    x = torch.randn(3, 7, 5)
    output = module.double()(x.double())[0]
    for name in weights(module):
        remove_parametrizations(module, name)
    assert type(module) is kind[0]
    torch.testing.assert_close(module(x.double())[0], output)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    assert not torch.equal(module(x.double())[0], output)


@pytest.mark.parametrize(("cell", "gates"), [(nn.RNNCell, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_cells(cell, gates):
    module = orthogonal(orthogonal(cell(5, 6), "weight_ih"), "weight_hh", EXP_ORTHO_PARAMS)
    for name in ("weight_ih", "weight_hh"):
        found = blocks(module, name, gates)
        assert orthogonality_defect(found).max() <= contract(found)
    start = torch.randn(2, 6)
    state = module(torch.randn(2, 5), (start, start) if cell is nn.LSTMCell else start)
    (state[0] if isinstance(state, tuple) else state).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_classes_constrain_the_recurrence_and_pickle(kind):
    _, ortho, gates, arguments = kind
    torch.manual_seed(0)
    scale = {} if ortho is og.OrthoRNN else {"horizon": 20}
    module = ortho(5, 6, num_layers=2, ortho_params=og.POLAR_ORTHO_PARAMS, **arguments, **scale)
    names = [name for name in weights(module) if "_ih_" not in name]
    for name in names:
        found = blocks(module, name, gates)
        assert orthogonality_defect(found).max() <= contract(found)
    assert isinstance(module.weight_ih_l0, nn.Parameter)
    restored = pickle.loads(pickle.dumps(module))
    x = torch.randn(4, 2, 5)
    assert torch.equal(restored(x)[0], module(x)[0])
    assert repr(restored) == repr(module)


def test_inputs_are_constrained_on_request(kind):
    _, ortho, gates, arguments = kind
    module = ortho(5, 6, constrain_inputs=True, **arguments)
    found = blocks(module, "weight_ih_l0", gates)
    assert orthogonality_defect(found).max() <= contract(found)


def test_on_the_meta_device(kind):
    _, ortho, gates, arguments = kind
    module = ortho(5, 6, device="meta", **arguments).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()
    found = blocks(module, "weight_hh_l0", gates)
    assert orthogonality_defect(found).max() <= contract(found)
    assert torch.isfinite(module(torch.randn(4, 2, 5))[0]).all()


def test_gradients_survive_a_hundred_steps():
    """The hidden state's influence on itself 100 steps later: 0 to rounding in torch's LSTM."""
    torch.manual_seed(0)
    inputs = torch.randn(100, 1, 64)

    def influence(module):
        def after(state):
            return module(inputs, (state.view(1, 1, 64), torch.zeros(1, 1, 64)))[1][0].flatten()

        jacobian = torch.autograd.functional.jacobian(after, torch.zeros(64))
        return float(jacobian.square().sum() / 64) ** 0.5

    assert influence(nn.LSTM(64, 64)) < 1e-15
    assert influence(og.OrthoLSTM(64, 64, horizon=10, lower_input_gate=False)) >= 0.5


@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_states_survive_a_hundred_steps_whatever_the_input(size, seed):
    """Hidden state and cell together neither die nor grow."""
    torch.manual_seed(seed)
    inputs = size * torch.randn(100, 1, 64)
    module = og.OrthoLSTM(64, 64, horizon=100)

    def after(state):
        return torch.cat(module(inputs, (state[:64].view(1, 1, 64), state[64:].view(1, 1, 64)))[1], -1).flatten()

    jacobian = torch.autograd.functional.jacobian(after, torch.zeros(128))
    assert 0.5 <= float(jacobian.square().sum() / 128) ** 0.5 <= 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1 step, got 0"):
        og.OrthoLSTM(3, 4, horizon=0)
    with pytest.raises(ValueError, match="needs bias=True"):
        og.OrthoGRU(3, 4, bias=False, horizon=5)
    with pytest.raises(TypeError, match=r"horizon must be an integer, got 2\.5"):
        og.OrthoLSTM(3, 4, horizon=2.5)
    with pytest.raises(ValueError, match=r"blocks=5 must divide the 24 rows of LSTM\.weight_hh_l0"):
        orthogonal(nn.LSTM(5, 6), "weight_hh_l0", blocks=5)
