import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from orthogonium.models import lipschitz_mlp
from orthogonium.training import CheckpointError, load_model, save_model
from orthogonium.training.checkpoint import load_tensors, save_tensors


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return lipschitz_mlp(6, 3, width=width, depth=2)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, network())
    return path


def untouched(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def refused(path, match, model=None):
    """Loading fails with one clear error and changes nothing."""
    model = model or network(seed=1)
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path, model)
    assert str(path) in str(caught.value)
    assert untouched(model, before)


def test_round_trip_is_bitwise_and_leaves_no_other_file(saved):
    model = network(seed=1)
    load_model(saved, model)
    assert untouched(model, network().state_dict().values())
    assert [file.name for file in saved.parent.iterdir()] == ["model.safetensors"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_noticed(saved, data):
    good = saved.read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    flipped = good[position] ^ data.draw(st.integers(1, 255))
    broken = saved.with_name("broken.safetensors")
    broken.write_bytes(good[:position] + bytes([flipped]) + good[position + 1 :])
    model = network(seed=1)
    before = [t.clone() for t in model.state_dict().values()]
    try:
        load_model(broken, model)
    except CheckpointError:
        assert untouched(model, before)
    else:  # a byte that means nothing, such as padding of the header
        assert untouched(model, network().state_dict().values())


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_cut_file_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    refused(saved, "cannot be read as safetensors")


def test_a_missing_file_a_folder_and_a_pickle_are_refused(saved, tmp_path):
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "not a file")
    saved.write_bytes(pickle.dumps({"weight": [1.0]}))
    refused(saved, "cannot be read as safetensors")


def test_foreign_and_newer_files_are_refused(saved):
    tensors = network().state_dict()
    save_file(tensors, saved)
    refused(saved, "was not written by orthogonium")
    header = {"format_version": 9, "sha256": "0" * 64, "extra": {}}
    save_file(tensors, saved, metadata={"orthogonium": json.dumps(header)})
    refused(saved, "format version 9")
    save_file(tensors, saved, metadata={"orthogonium": json.dumps({**header, "format_version": 1})})
    refused(saved, "checksum does not match")
    save_file(tensors, saved, metadata={"orthogonium": "[1"})
    refused(saved, "was not written by orthogonium")


def test_the_same_tensors_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        save_tensors(tmp_path / name, network().state_dict(), {"one": "1", "two": "2", "three": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_model_is_refused(saved):
    refused(saved, "has shape", network(width=16))
    refused(saved, "another model: it misses", lipschitz_mlp(6, 3, width=8, depth=3))
    refused(saved, r"has type torch\.float32, the model has torch\.float64", network().double())


def test_nan_is_refused_even_with_a_right_checksum(saved):
    tensors = dict(network().state_dict())
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_tensors(saved, tensors)
    refused(saved, "NaN or infinite")


def test_extra_text_is_covered_by_the_checksum(tmp_path):
    path = tmp_path / "a.safetensors"
    like = {"a": torch.arange(3), "scalar": torch.tensor(1.0)}
    save_tensors(path, like, {"note": "first"})
    tensors, extra = load_tensors(path, like)
    assert torch.equal(tensors["a"], like["a"])
    assert extra == {"note": "first"}
    path.write_bytes(path.read_bytes().replace(b"first", b"worst"))
    with pytest.raises(CheckpointError, match="checksum"):
        load_tensors(path, like)


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    good = saved.read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(saved, network(seed=2))
    assert saved.read_bytes() == good
    assert len(list(saved.parent.iterdir())) == 1
