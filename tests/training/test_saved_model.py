import json

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.cli import main
from orthogonium.cli.loading import load_run
from orthogonium.layers import AOLConv2d
from orthogonium.training import RunFolderError, load_digits, save_run


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5)), og.MaxMin())
    model.append(og.UnitNormLinear(12, 10, bias=False))
    og.convert(model)
    return model


def test_the_folder_gives_back_the_same_numbers(tmp_path):
    model = network()
    save_run(tmp_path / "run", model)
    assert model.training
    again, config = load_run(tmp_path / "run")
    x = load_digits().x_eval[:20]
    assert torch.equal(again(x), model.eval()(x))
    assert (config.evaluate_on, config.split_seed) == ("test", 0)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["certified_accuracy"]) == ["0.1", "0.25", "0.5", "1.0"]
    assert metrics["certified_accuracy"]["0.1"] <= metrics["clean_accuracy"]
    assert metrics["lipschitz_bound"] >= 1 - 1e-5


def test_convolutions_keep_their_geometry(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        og.OrthoConv2d(1, 4, 3),
        og.GroupSort(4),
        og.OrthoConv2d(4, 8, 3, stride=2),
        AOLConv2d(8, 8, 3, groups=8, padding=1, padding_mode="zeros"),
        nn.Flatten(),
        og.OrthoLinear(128, 10),
    )
    save_run(tmp_path / "run", model)
    again, _ = load_run(tmp_path / "run")
    x = load_digits().x_eval[:20]
    assert torch.equal(again(x), model.eval()(x))


def test_commands_work_on_it(tmp_path, capsys):
    save_run(tmp_path / "run", network(), evaluate_on="validation")
    assert main(["certify", str(tmp_path / "run"), "--attack", "--steps", "2", "--restarts", "1"]) == 0
    assert "validation images" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "Lipschitz bound of the network" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "run"), "--signal"]) == 0
    assert (tmp_path / "run" / "signal.png").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "plain.safetensors")]) == 0


class Tripled(nn.Sequential):
    def forward(self, x):
        return 3 * super().forward(x)


class Linear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked():
    layer = nn.Linear(64, 10)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return nn.Sequential(layer)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"^1\.0 is a Tanh, which cannot be saved as data"):
        save_run(tmp_path / "run", nn.Sequential(nn.Linear(64, 10), nn.Sequential(nn.Tanh())))
    for model, message in (
        (Tripled(nn.Linear(64, 10)), "the model itself is a Tripled"),
        (nn.Sequential(Linear(64, 10)), r"0 is a tests\.training\.test_saved_model\.Linear, which"),
        (hooked(), "0 has forward hooks"),
        (nn.Sequential(nn.Linear(64, 5)), r"\(N, 10\) logits, got \('N', 5\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            save_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match="radii must be finite"):
        save_run(tmp_path / "run", network(), radii=(float("nan"),))
    assert not (tmp_path / "run").exists()
    save_run(tmp_path / "run", network())
    with pytest.raises(RunFolderError, match="is not empty"):
        save_run(tmp_path / "run", network())


@pytest.mark.parametrize("damage", ["version", "layer", "arguments", "missing", "batch", "seed", "part", "no layer"])
def test_a_damaged_config_takes_a_line(damage, tmp_path, capsys):
    folder = save_run(tmp_path / "run", network())
    values = json.loads(folder.config.read_text())
    if damage == "version":
        values["format_version"] = 99
    elif damage == "layer":
        values["saved_model"]["layers"][0]["type"] = "Lambda"
    elif damage == "arguments":
        values["saved_model"]["layers"][0]["widths"] = 3
    elif damage == "batch":
        values["saved_model"]["layers"][-2]["dim"] = 0
    elif damage == "seed":
        values["saved_model"]["split_seed"] = "0"
    elif damage == "part":
        values["saved_model"]["evaluate_on"] = "all"
    elif damage == "no layer":
        values["saved_model"]["layers"][0] = 1
    else:
        del values["saved_model"]["layers"]
    folder.config.write_text(json.dumps(values))
    assert main(["certify", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert "Traceback" not in error


def test_a_layer_changed_after_it_was_made_is_not_saved_as_its_arguments(tmp_path):
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    conv._conv_forward = lambda x, weight, bias: 2 * nn.functional.conv2d(x, weight, bias, padding=1)
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), conv, nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="other results than its layers as data"):
        save_run(tmp_path / "run", model)
