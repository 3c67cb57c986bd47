"""The folder that a training run leaves behind."""

import json
import os
from pathlib import Path
from typing import Any

from orthogonium.training.config import TrainConfig


class RunFolderError(Exception):
    """The folder cannot be used; the message says why and what to do instead."""


class RunFolder:
    """Paths and JSON files of one run. Files are replaced whole, never half written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model.safetensors"
        self.unfinished = path / "unfinished.safetensors"  # there while training could go on
        self.config = path / "config.json"
        self.metrics = path / "metrics.json"
        self.history = path / "history.json"
        self.curves = path / "curves.json"

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new or empty folder at ``path``, known to be writable.

        Raises:
            RunFolderError: it holds something already, is not a folder, or cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file. Choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise RunFolderError(
                    f"{path} is not empty and stays as it is. Choose another --out, or --resume an interrupted run"
                )
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}. Choose another --out") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            RunFolderError: there is no ``config.json`` in it.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no config.json. Make one with `train --out`")
        return folder

    def read_config(self) -> TrainConfig:
        """The config of the run; :class:`RunFolderError` if it is damaged or of another version."""
        try:
            return TrainConfig.from_dict(json.loads(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunFolderError(f"{self.config} cannot be read: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON; the file appears complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
