"""``orthogonium export``: files that other programs read, with the outputs of the run."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from orthogonium.cli import main
from orthogonium.cli.loading import load_run
from orthogonium.training import load_digits

QUICK = ["--epochs", "1", "--width", "16", "--depth", "2", "--attack-steps", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *QUICK, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def expected(run):
    model, _ = load_run(run)
    x = load_digits("test", 0).x_eval[:5]
    return x, model(x).detach()


def test_a_program(run, expected, tmp_path):
    file = tmp_path / "digits.pt2"
    assert main(["export", str(run), str(file)]) == 0
    x, logits = expected
    program = torch.export.load(file).module()
    torch.testing.assert_close(program(x), logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(program(x[:2]), logits[:2], rtol=0, atol=1e-6)


def test_onnx(run, expected, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "digits.onnx"
    assert main(["export", str(run), str(file)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["digits.onnx"]
    x, logits = expected
    session = onnxruntime.InferenceSession(str(file))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-5)


def test_plain_weights(run, expected, tmp_path, capsys):
    file = tmp_path / "digits.safetensors"
    assert main(["export", str(run), str(file)]) == 0
    assert "plain weights" in capsys.readouterr().out
    weights = load_file(file)
    x, logits = expected
    matrices = sorted({name.removesuffix(".weight") for name in weights if name.endswith(".weight")})
    first = nn.functional.linear(x, weights[f"{matrices[0]}.weight"], weights[f"{matrices[0]}.bias"])
    first = first.unflatten(1, (-1, 2))
    hidden = torch.stack((first.amax(-1), first.amin(-1)), -1).flatten(1)
    found = nn.functional.linear(hidden, weights[f"{matrices[1]}.weight"], weights[f"{matrices[1]}.bias"])
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_failures_take_a_line(run, tmp_path, capsys):
    for arguments, status, text in [
        ([run, tmp_path / "digits.bin"], 2, "FILE must end in .pt2, .onnx, .safetensors, got digits.bin"),
        ([tmp_path, tmp_path / "digits.pt2"], 1, "is not a run folder"),
        ([run, tmp_path / "missing" / "digits.pt2"], 1, "No such file or directory"),
    ]:
        assert main(["export", *map(str, arguments)]) == status
        error = capsys.readouterr().err
        assert text in error
        assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_onnxscript_it_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    def missing(*arguments, **more):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(torch.onnx, "export", missing)
    assert main(["export", str(run), str(tmp_path / "digits.onnx")]) == 1
    assert "pip install onnx onnxscript" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
