import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import orthogonium as og
from orthogonium.layers import AOLConv2d, AOLConvTranspose1d, SkewOrthoConv1d, SkewOrthoConv2d
from orthogonium.reparametrizers import PRESETS
from tests.surgery.zoo import ZOO, build

LAYERS = {
    "linear": lambda: (og.OrthoLinear(5, 7), (3, 5)),
    "unit_norm": lambda: (og.UnitNormLinear(5, 7, bias=False), (3, 5)),
    "conv1d": lambda: (og.OrthoConv1d(4, 6, 5), (2, 4, 9)),
    "conv2d": lambda: (og.OrthoConv2d(4, 6, 3), (2, 4, 6, 6)),
    "conv2d_strided": lambda: (og.OrthoConv2d(4, 6, 3, stride=2), (2, 4, 6, 8)),
    "conv2d_even_zeros": lambda: (og.OrthoConv2d(4, 6, (4, 3), padding_mode="zeros", bias=False), (2, 4, 6, 5)),
    "conv2d_groups_dilated": lambda: (og.OrthoConv2d(4, 8, 3, dilation=2, groups=2), (2, 4, 6, 7)),
    "conv3d": lambda: (og.OrthoConv3d(2, 4, 2, stride=2), (1, 2, 4, 4, 6)),
    "transposed1d": lambda: (og.OrthoConvTranspose1d(6, 4, 5, stride=2), (2, 6, 5)),
    "transposed2d": lambda: (og.OrthoConvTranspose2d(8, 4, 3, stride=2), (2, 8, 4, 5)),
    "transposed2d_plain": lambda: (og.OrthoConvTranspose2d(8, 4, 2, stride=2), (2, 8, 4, 5)),
    "transposed2d_wide": lambda: (og.OrthoConvTranspose2d(4, 8, 1, stride=2), (2, 4, 4, 5)),
    "transposed2d_zeros": lambda: (og.OrthoConvTranspose2d(8, 4, 3, padding=1, padding_mode="zeros"), (2, 8, 4, 5)),
    "transposed2d_cropped": lambda: (og.OrthoConvTranspose2d(8, 4, 4, padding_mode="zeros", bias=False), (2, 8, 4, 5)),
    "transposed3d": lambda: (og.OrthoConvTranspose3d(4, 2, (3, 2, 3)), (1, 4, 3, 4, 5)),
    "skew1d": lambda: (SkewOrthoConv1d(4, 6, 3, padding_mode="zeros"), (2, 4, 7)),
    "skew2d": lambda: (SkewOrthoConv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "aol": lambda: (AOLConv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "aol_transposed": lambda: (AOLConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "max_min": lambda: (og.MaxMin(), (2, 6, 5)),
    "group_sort_last": lambda: (og.GroupSort(3, dim=-1), (2, 5, 6)),
    "rnn": lambda: (og.OrthoRNN(4, 5, nonlinearity="relu"), (3, 2, 4)),
    "lstm": lambda: (og.OrthoLSTM(4, 5, 2, bidirectional=True, batch_first=True), (3, 2, 4)),
    "gru": lambda: (og.OrthoGRU(4, 5, bias=False), (3, 2, 4)),
}


def is_plain(model):
    return not any(
        is_parametrized(module) or type(module).__module__.startswith("orthogonium") for module in model.modules()
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_a_plain_form_with_the_same_bits(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    model = nn.Sequential(layer) if not isinstance(layer, nn.RNNBase) else layer
    x = torch.randn(shape)
    plain = og.export(model)
    assert is_plain(plain)
    assert not plain.training
    assert model.training
    expected, found = model.eval()(x), plain(x)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert torch.equal(found, expected)
    torch.jit.trace(plain, x, check_trace=False)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    assert "orthogonium" not in str(buffer.getvalue())
    again = torch.load(buffer, weights_only=False)(x)
    assert torch.equal(again[0] if isinstance(again, tuple) else again, expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 7), (7, 4)], ids=str)
def test_weights_of_evaluation_are_row_major(preset, sizes):
    """As files of tensors demand, whatever layout the preset computes them in."""
    layer = og.OrthoLinear(*sizes, ortho_params=PRESETS[preset]).eval()
    assert layer.weight.is_contiguous()
    assert og.export(layer).weight.is_contiguous()
    remove_parametrizations(layer, "weight")
    assert layer.weight.is_contiguous()


@pytest.mark.parametrize("name", ZOO)
def test_converted_models_export_with_the_same_outputs(name):
    model, x = build(name)
    og.convert(model)
    with torch.no_grad():
        model.train()(x)  # statistics of normalisation layers
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    plain = og.export(model)
    assert is_plain(plain)
    assert {type(module) for module in plain.modules()} <= {type(module) for module in ZOO[name][0]().modules()}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(plain(x), model.eval()(x))
    fresh, _ = build(name)
    fresh.eval().load_state_dict(plain.state_dict())  # the model as it was written, without the library
    torch.testing.assert_close(fresh(x), plain(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert model(x).abs().sum() > 0  # no memory is shared


def test_tied_weights_and_shared_modules_stay_so():
    model, _ = build("lstm")
    og.convert(model)
    plain = og.export(model)
    assert plain.head.weight is plain.embedding.weight
    layer = og.OrthoLinear(4, 4)
    plain = og.export(nn.Sequential(layer, nn.ReLU(), layer))
    assert plain[0] is plain[2]


def test_deep_copies_keep_working_after_an_export():
    torch.manual_seed(0)
    model = nn.Sequential(og.OrthoLinear(4, 4))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight = -model[0].weight
    with torch.nn.utils.parametrize.cached():
        first, second = og.export(model), og.export(twin)
    assert torch.equal(first[0].weight, model[0].weight)
    assert torch.equal(second[0].weight, twin[0].weight)
    assert not torch.equal(first[0].weight, second[0].weight)
    assert is_parametrized(model[0])
    assert is_parametrized(twin[0])


def test_attributes_of_a_users_module_point_into_the_copy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = og.OrthoLinear(3, 3)
            self.stages = [self.layer]  # no registration
            self.register_buffer("scale", torch.ones(1), persistent=False)
            self.layer.register_forward_hook(lambda module, inputs, output: 2 * output)

        def forward(self, x):
            return self.stages[0](x) * self.scale

    model = Net()
    plain = og.export(model)
    assert plain.stages[0] is plain.layer
    assert type(plain.layer) is nn.Linear
    assert plain.state_dict().keys() == {"layer.weight", "layer.bias"}


def test_hooks_of_the_user_stay_and_ours_go():
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular")
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    og.orthogonal(layer)
    x = torch.randn(1, 8, 6, 6)
    plain = og.export(layer)
    assert torch.equal(plain(x), layer(x))
    assert len(plain._forward_hooks) == 1
    plain(torch.randn(1, 8, 7, 7))
    assert len(plain._load_state_dict_pre_hooks) == 0


def test_compiled_and_torch_parametrized_models():
    inner = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), og.OrthoLinear(3, 3))
    plain = og.export(torch.compile(inner))
    assert is_plain(plain)
    x = torch.randn(2, 3)
    assert torch.equal(plain(x), inner(x))


def test_trainability_is_kept():
    model = nn.Sequential(og.OrthoLinear(3, 3), og.OrthoConv1d(3, 3, 3))
    model[1].requires_grad_(False)
    plain = og.export(model)
    assert [p.requires_grad for p in plain.parameters()] == [True, True, False, False]


FOLDS = {
    "conv": lambda: (nn.Sequential(og.OrthoConv2d(3, 6, 3, stride=2), og.BatchCentering(6), nn.ReLU()), (4, 3, 4, 4)),
    "conv_plain": lambda: (nn.Sequential(nn.Conv1d(3, 6, 3, bias=False), og.LipschitzBatchNorm(6)), (4, 3, 7)),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), og.LipschitzBatchNorm(6, bias=False)),
        (4, 4, 3, 3),
    ),
    "linear": lambda: (
        nn.Sequential(nn.Flatten(), og.OrthoLinear(12, 8), og.MaxMin(), og.OrthoLinear(8, 8), og.LipschitzBatchNorm(8)),
        (4, 3, 4),
    ),
}


def with_statistics(model, shape):
    torch.manual_seed(0)
    for scale in (1.0, 2.0):
        model(scale * torch.randn(shape) + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return torch.randn(shape)


@pytest.mark.parametrize("name", FOLDS)
def test_centring_folds_into_the_map_before_it(name):
    torch.manual_seed(0)
    model, shape = FOLDS[name]()
    x = with_statistics(model, shape)
    plain = og.export(model)
    assert any(type(module) is nn.Identity for module in plain)
    assert not any(isinstance(module, torch.fx.GraphModule) and "mean" in module.code for module in plain)
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=0, atol=2e-6)


def test_what_is_shared_or_not_flat_is_not_folded():
    conv, linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 5)
    shared = nn.Sequential(conv, og.BatchCentering(4), conv)
    x = with_statistics(shared, (2, 4, 5, 5))
    torch.testing.assert_close(og.export(shared)(x), shared.eval()(x), rtol=0, atol=1e-6)
    rows = nn.Sequential(linear, og.BatchCentering(5))  # axis 1 is not the one that the layer writes
    x = with_statistics(rows, (2, 5, 5))
    torch.testing.assert_close(og.export(rows)(x), rows.eval()(x), rtol=0, atol=1e-6)
    tied = nn.ModuleList([nn.Sequential(nn.Conv1d(3, 3, 1), og.BatchCentering(3)), nn.Conv1d(3, 3, 1)])
    tied[1].bias = tied[0][0].bias
    og.convert(tied)
    tied[0](torch.randn(2, 3, 4) + 5)
    plain, x = og.export(tied), torch.randn(2, 3, 4)
    tied.eval()
    torch.testing.assert_close(plain[0](x), tied[0](x), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain[1](x), tied[1](x), rtol=0, atol=1e-6)


def demo_network():
    torch.manual_seed(0)
    return nn.Sequential(
        og.OrthoConv2d(1, 8, 3),
        og.MaxMin(),
        og.OrthoConv2d(8, 16, 3, stride=2),
        og.GroupSort(4),
        og.OrthoConvTranspose2d(16, 4, 3, stride=2),
        nn.Flatten(),
        og.OrthoLinear(4 * 64, 16),
        og.MaxMin(),
        og.UnitNormLinear(16, 10),
    ).eval()


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'orthogonium':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
x, y = torch.load(sys.argv[1])
assert torch.equal(torch.load(sys.argv[2], weights_only=False)(x), y)
assert torch.equal(torch.export.load(sys.argv[3]).module()(x), y)
print('fine')
"""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_process_without_this_library_loads_it(tmp_path: Path):
    model, x = demo_network(), torch.randn(3, 1, 8, 8)
    plain = og.export(model)
    paths = [tmp_path / name for name in ("data.pt", "module.pt", "program.pt2")]
    torch.save((x, model(x).detach()), paths[0])
    torch.save(plain, paths[1])
    torch.export.save(torch.export.export(plain, (x,)), paths[2])
    command = [sys.executable, "-W", "ignore", "-c", REFUSE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.stdout.strip() == "fine", result.stderr


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["demo", "resnet", "transformer"])
def test_onnxruntime_agrees(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name == "demo":
        model, x = demo_network(), torch.randn(3, 1, 8, 8)
    else:
        model, x = build(name)
        og.convert(model)
    plain = og.export(model)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(plain, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(x).detach(), rtol=0, atol=1e-5)


def test_what_cannot_be_written_in_torch_operations_is_named(monkeypatch):
    monkeypatch.setitem(og.surgery.plain.RULES, og.GroupSort, og.surgery.plain.RULES[og.GroupSort])
    monkeypatch.delitem(og.surgery.plain.RULES, og.GroupSort)
    with pytest.raises(TypeError, match=r"^1 is a MaxMin, for which there is no form in torch operations"):
        og.export(nn.Sequential(nn.Identity(), og.MaxMin()))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        og.export([nn.Identity()])
