import json
import sys
from pathlib import Path

import pytest

from orthogonium.training import RunFolder, RunFolderError, TrainConfig
from orthogonium.training.run_folder import write_json


def test_new_and_empty_folders_are_taken(tmp_path):
    assert RunFolder.create(tmp_path / "a" / "b").path.is_dir()
    assert not list(RunFolder.create(tmp_path / "a" / "b").path.iterdir())


def test_files_and_full_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"not empty and stays as it is.*--out.*--resume"):
        RunFolder.create(tmp_path)
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_refused():
    with pytest.raises(RunFolderError, match=r"cannot be written: .*Choose another --out"):
        RunFolder.create(Path("/proc/run"))  # read-only for the administrator too


def test_damaged_configs_are_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder: it has no config\.json"):
        RunFolder.open(tmp_path)
    folder = RunFolder(tmp_path)
    for content in ("{", "[]", "[" * 100_000, json.dumps({**TrainConfig().to_dict(), "width": "wide"})):
        folder.config.write_text(content)
        with pytest.raises(RunFolderError, match=r"config\.json cannot be read"):
            RunFolder.open(tmp_path).read_config()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert len(list(tmp_path.iterdir())) == 1
