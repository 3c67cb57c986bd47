"""The commands as a user runs them: what they print, write, return, and refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from orthogonium.cli import main
from orthogonium.training import RunFolder, TrainConfig, load_model
from orthogonium.training.checkpoint import save_tensors

QUICK = ["--epochs", "2", "--width", "16", "--depth", "2", "--attack-steps", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that training left behind; tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", *QUICK, "--seed", "3", "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def failure(capsys, arguments, status):
    """The message of a command that must fail: at most two lines, and no traceback."""
    assert main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines
    assert "Traceback" not in captured.err
    message = [line for line in lines if "error: " in line]
    assert len(message) == 1
    return message[0]


def test_train_writes_every_file(finished):
    assert {file.name for file in finished.iterdir()} == {
        "model.safetensors", "config.json", "metrics.json", "history.json", "curves.json",
        "certified_accuracy.png", "training_curves.png", "singular_values.png",
    }  # fmt: skip
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"clean_accuracy", "certified_accuracy", "lipschitz_bound", "seconds"}
    assert list(metrics["certified_accuracy"]) == ["0.1", "0.25", "0.5", "1.0"]
    assert 0.5 < metrics["certified_accuracy"]["0.1"] <= metrics["clean_accuracy"] <= 1
    assert metrics["lipschitz_bound"] == pytest.approx(1, abs=1e-4)
    curves = json.loads((finished / "curves.json").read_text())
    for radius, share in metrics["certified_accuracy"].items():
        assert share <= curves["attacked"][radius]
    assert len(json.loads((finished / "history.json").read_text())) == 2


def test_the_same_seed_gives_the_same_metrics(finished, tmp_path):
    assert main(["train", *QUICK, "--seed", "3", "--out", str(tmp_path / "again")]) == 0
    first, again = (json.loads((p / "metrics.json").read_text()) for p in (finished, tmp_path / "again"))
    del first["seconds"], again["seconds"]
    assert first == again


def test_train_prints_the_table_and_where_the_files_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--epochs", "1", "--evaluate-on", "validation"]) == 0
    printed = capsys.readouterr().out
    assert "337 validation images" in printed
    assert "0 (clean)" in printed
    assert "under attack" in printed
    assert "runs/digits-default-seed0" in printed
    assert (tmp_path / "runs" / "digits-default-seed0" / "metrics.json").exists()


def test_certify_repeats_the_metrics_and_states_the_proof(finished, capsys):
    assert main(["certify", str(finished), "--attack", "--steps", "10", "--restarts", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for share in json.loads((finished / "metrics.json").read_text())["certified_accuracy"].values():
        assert f"{100 * share:.1f} %" in printed
    bound = json.loads((finished / "metrics.json").read_text())["lipschitz_bound"]
    assert f"{bound:.9f}-Lipschitz" in printed
    assert "float64" in printed
    assert "MaxMin 1.000000000" in printed
    assert "bound so far" in printed
    assert "changed no certified prediction" in printed


def test_certify_speaks_of_float32_when_asked(finished, capsys):
    assert main(["certify", str(finished), "--precision", "float32"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "evaluated in float32 with round to nearest" in printed
    certified = json.loads((finished / "metrics.json").read_text())["certified_accuracy"]
    shown = float(printed.split("0.25 ")[1].split(" %")[0]) / 100
    assert 0 < shown <= certified["0.25"] + 5e-4


def test_inspect_shows_every_layer(finished, capsys):
    assert main(["inspect", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "16 × 64" in printed or "64 × 16" in printed
    assert "10 × 16" in printed
    assert "Lipschitz bound of the network: 1.0000" in printed


def test_inspect_shows_how_signals_travel(run, tmp_path, capsys):
    assert main(["inspect", str(run), "--signal"]) == 0
    printed = capsys.readouterr().out
    assert "activation" in printed
    assert "OrthoLinear" in printed
    assert "MaxMin" in printed
    assert "No faults found." in printed
    assert (run / "signal.png").stat().st_size > 10_000
    assert main(["inspect", str(run), "--signal", "--plot", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").exists()
    assert "--plot needs --signal" in failure(capsys, ["inspect", run, "--plot", "a.png"], 2)
    assert "must end in .png, .svg or .pdf" in failure(capsys, ["inspect", run, "--signal", "--plot", "a.doc"], 2)
    assert "there is no folder" in failure(capsys, ["inspect", run, "--signal", "--plot", run / "b" / "a.png"], 2)


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal delivers it: jobs started in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_resumes_to_the_same_metrics(finished, tmp_path, capsys, monkeypatch):
    path = tmp_path / "stopped"
    build, steps = TrainConfig.build_model, []

    def press_ctrl_c(module, inputs):
        steps.append(module)
        if len(steps) == 30:  # in the second epoch
            signal.raise_signal(signal.SIGINT)

    def build_fragile(self):
        model = build(self)
        model.register_forward_pre_hook(press_ctrl_c)
        return model

    monkeypatch.setattr(TrainConfig, "build_model", build_fragile)
    arguments = ["train", *QUICK, "--seed", "3", "--out", path]
    assert "interrupted after 1 of 2 epochs" in failure(capsys, arguments, 130)
    monkeypatch.undo()
    folder = RunFolder.open(path)
    load_model(folder.model, folder.read_config().build_model())
    assert not folder.metrics.exists()
    assert main(["inspect", str(path)]) == 0
    assert main(["train", "--resume", "--out", str(path), "--attack-steps", "0"]) == 0
    resumed, whole = (json.loads((p / "metrics.json").read_text()) for p in (path, finished))
    assert resumed["certified_accuracy"] == whole["certified_accuracy"]
    assert (path / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert not folder.unfinished.exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process")
def test_ctrl_c_in_a_terminal_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "orthogonium",
        "train",
        "--width",
        "16",
        "--depth",
        "2",
        "--epochs",
        "100000",
    ]
    process = subprocess.Popen([*command, "--out", path], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (path / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    folder = RunFolder.open(path)
    load_model(folder.model, folder.read_config().build_model())


def test_resume_refuses_other_options_and_finished_runs(run, capsys):
    assert "--width 32 differs from the run's 16" in failure(
        capsys, ["train", "--resume", "--out", run, "--width", 32], 2
    )
    assert "--temperature 16.0 differs" in failure(capsys, ["train", "--resume", "--out", run, "--recipe", "radius"], 2)
    assert "nothing to resume" in failure(capsys, ["train", "--resume", "--out", run], 2)
    assert "not a run folder" in failure(capsys, ["train", "--resume", "--out", run / "none"], 1)


def test_a_full_folder_is_left_as_it_is(run, capsys):
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert "is not empty" in failure(capsys, ["train", *QUICK, "--out", run], 1)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "-3"], "epochs must lie in 1 … 1000000, got -3"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--width", "7"], "width must be even, got 7. Use 8"),
        (["--depth", "0"], "depth must lie in 1 … 1000, got 0"),
        (["--learning-rate", "nan"], "learning_rate must be above 0, got nan"),
        (["--temperature", "-1"], "temperature must be above 0, got -1.0"),
        (["--attack-steps", "-1"], "--attack-steps must be at least 0, got -1"),
        (["--threads", "9" * 20], "argument --threads: must be at most 1024, got 99999999999999999999"),
        (["--model", "cnn", "--depth", "2"], "depth must be at least 4 (two convolutions, two linear layers), got 2"),
        (["--model", "cnn", "--width", "100"], "width must be a multiple of 32, got 100. Use 96"),
        (["--threads", "0"], "argument --threads: must be a whole number of at least 1, got 0"),
        (["--preset", "magic"], "invalid choice: 'magic'"),
        (["--model", "rnn"], "invalid choice: 'rnn'"),
        (["--seed", "-1"], "seed must lie in 0"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_status_2_and_writes_nothing(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in failure(capsys, ["train", *arguments, "--out", out], 2)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    message = failure(capsys, ["train", "--device", "cuda", "--out", tmp_path / "run"], 2)
    assert "--device cuda cannot be used here" in message
    assert "--device cpu" in message


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_refused(capsys):
    assert "/proc/run cannot be written" in failure(capsys, ["train", *QUICK, "--out", "/proc/run"], 1)


def test_no_command_is_wrong_usage(capsys):
    assert "required" in failure(capsys, [], 2)


@pytest.mark.parametrize("command", ["certify", "inspect"])
def test_damaged_runs_are_refused(run, capsys, command):
    model = run / "model.safetensors"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "checksum" in failure(capsys, [command, run], 1)
    model.write_bytes(good[: len(good) // 2])
    assert "cannot be read as safetensors" in failure(capsys, [command, run], 1)
    save_file({"a": torch.ones(2)}, model)
    assert "not written by orthogonium" in failure(capsys, [command, run], 1)
    save_tensors(model, {"a": torch.ones(2)})
    assert "another model" in failure(capsys, [command, run], 1)
    model.unlink()
    assert "does not exist" in failure(capsys, [command, run], 1)
    (run / "config.json").write_text("{}")
    assert "config.json cannot be read" in failure(capsys, [command, run], 1)
    (run / "config.json").unlink()
    assert "not a run folder" in failure(capsys, [command, run], 1)


def test_certify_checks_its_options(run, capsys):
    assert "--radii must be finite and above 0, got -1.0" in failure(capsys, ["certify", run, "--radii", "-1"], 2)
    assert "--steps must be at least 1, got 0" in failure(capsys, ["certify", run, "--steps", "0"], 2)


def test_a_missing_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    message = failure(capsys, ["inspect", run], 1)
    assert "rich.table is not installed" in message
    assert "pip install -e '.[demo]'" in message


def test_too_little_memory_is_said(run, capsys, monkeypatch):
    def starve(path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("orthogonium.cli.inspect.load_run", starve)
    assert "not enough memory. Use a smaller --width" in failure(capsys, ["inspect", run], 1)


def test_a_terminal_without_these_signs_still_works(finished):
    command = [sys.executable, "-m", "orthogonium", "inspect", str(finished)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "Lipschitz bound of the network" in result.stdout


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert main(["train", "--help"]) == 0
    assert "--preset" in capsys.readouterr().out


def test_importing_the_commands_needs_torch_alone():
    code = "import sys, orthogonium.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    extras = ["matplotlib", "rich", "safetensors", "sklearn"]
    result = subprocess.run([sys.executable, "-c", code, *extras], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
