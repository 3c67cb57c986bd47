"""``orthogonium export``: the network of a run for programs that do not know this library."""

import argparse
import logging
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from orthogonium.cli.errors import CommandError
from orthogonium.cli.loading import load_run
from orthogonium.surgery import export
from orthogonium.training.checkpoint import save_tensors
from orthogonium.training.data import FEATURES

_FORMATS = {
    ".pt2": "a program for torch.export.load",
    ".onnx": "an ONNX model",
    ".safetensors": "the plain weights",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "export",
        help="write the network of a run for programs that do not know this library",
        description="Write the network of a run with its weights baked in: "
        + ", ".join(f"{meaning} ({suffix})" for suffix, meaning in _FORMATS.items())
        + ". It takes images as certify does: pixels divided by 16.",
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="run folder written by train")
    parser.add_argument("file", type=Path, metavar="FILE", help=f"to write or replace: {', '.join(_FORMATS)}")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Write the file and say what it is."""
    suffix = options.file.suffix.lower()
    if suffix not in _FORMATS:
        raise CommandError(f"FILE must end in {', '.join(_FORMATS)}, got {options.file.name}", 2)
    model, _ = load_run(options.path)
    plain = export(model)
    unfinished = options.file.with_name(f".{options.file.stem}.{os.getpid()}{suffix}")
    try:
        unfinished.touch()  # an unwritable folder is found before the work is done
        _write(plain, unfinished, suffix)
        os.replace(unfinished, options.file)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{options.file}: {_FORMATS[suffix]}, {sum(p.numel() for p in plain.parameters()):,} numbers")
    return 0


def _write(plain: nn.Module, path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        save_tensors(path, plain.state_dict())
        return
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.set_(parameter.detach().contiguous())  # type: ignore[call-overload]
    example = (torch.zeros(2, FEATURES),)
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if suffix == ".pt2":
            torch.export.save(torch.export.export(plain, example, dynamic_shapes=shapes), path)
            return
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not needed
        try:
            program = torch.onnx.export(plain, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
        except ImportError as error:
            raise CommandError(
                f"{error.name} is not installed, which ONNX needs: pip install onnx onnxscript"
            ) from None
        assert program is not None
        program.save(path, external_data=False)
