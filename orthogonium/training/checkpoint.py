"""Tensors on disk with a checksum, read back only when they are exactly what a model expects."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "orthogonium"  # the one metadata entry; several would be written in no fixed order
_FORMAT_VERSION = 1


class CheckpointError(Exception):
    """The file is damaged, foreign, or not for this model. Nothing was loaded."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors with a format version and a checksum in the metadata.

    The file appears complete or not at all: it is written under another name and then moved.

    Args:
        path: the file to write or replace.
        tensors: by name, on any device.
        extra: further metadata, covered by the checksum.
    """
    from safetensors.torch import save

    still = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    extra = dict(extra or {})
    header = {"format_version": _FORMAT_VERSION, "sha256": _checksum(still, extra), "extra": extra}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(save(still, metadata={_KEY: json.dumps(header, sort_keys=True)}))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_tensors(path: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors that have the names, shapes and types of ``like``, all finite, and the extra metadata.

    Names, shapes and types come from the header and are checked before any payload is read, so a
    small file cannot ask for much memory; nothing is ever unpickled.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, of another program or version, or does
            not match.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata() or {})
            _check_names(path, set(file.keys()), set(like))
            for name, expected in like.items():
                _check_shape(path, name, file.get_slice(name).get_shape(), list(expected.shape))
            tensors = {name: file.get_tensor(name) for name in like}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors, it may be cut short: {error}") from error
    extra = header["extra"]
    for name, expected in like.items():
        if tensors[name].dtype != expected.dtype:
            raise CheckpointError(f"{path}: {name} has type {tensors[name].dtype}, the model has {expected.dtype}")
    if _checksum(tensors, extra) != header["sha256"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content. Restore a copy")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite entries")
    return tensors, extra


def save_model(path: Path, model: nn.Module) -> None:
    """Write the state dict of ``model``: free tensors and buffers, not the weights made from them."""
    save_tensors(path, model.state_dict())


def load_model(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint into ``model`` once all of it has been checked; see :func:`load_tensors`."""
    tensors, _ = load_tensors(path, model.state_dict())
    model.load_state_dict(tensors, strict=True)


def _checksum(tensors: Mapping[str, Tensor], extra: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes, and over the extra metadata."""
    digest = hashlib.sha256()
    for key in sorted(extra):
        digest.update(repr((key, extra[key])).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Format version, checksum and extra text, from the metadata of the file."""
    try:
        header = json.loads(metadata[_KEY])
        version, checksum, extra = header["format_version"], header["sha256"], header["extra"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{path} was not written by orthogonium: its metadata name no such format") from None
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this version reads {_FORMAT_VERSION}")
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path} is damaged: its metadata are not those that were written")
    return {"sha256": checksum, "extra": extra}


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise CheckpointError(f"{path} is for another model: it misses {missing[:3]} and has unknown {unknown[:3]}")


def _check_shape(path: Path, name: str, found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise CheckpointError(f"{path} is for another model: {name} has shape {found}, the model has {expected}")
