"""The command line: read arguments, run one command, turn failures into a line and a status."""

import argparse
import io
import sys
from collections.abc import Sequence

import torch

from orthogonium._version import __version__
from orthogonium.cli import certify, export, inspect, train
from orthogonium.cli.errors import CommandError
from orthogonium.training import CheckpointError, RunFolderError, TrainingDiverged

_MOST_THREADS = 1024
_EXTRAS = {"matplotlib", "rich", "safetensors", "sklearn", "numpy", "scipy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``orthogonium`` with ``arguments`` (by default those of the process).

    Returns:
        0 on success, 1 on failure, 2 on wrong usage, 130 when interrupted. Errors are one or two lines
        on standard error.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign shows "?" instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its message
        return int(stop.code or 0)
    torch.set_num_threads(options.threads)
    try:
        return int(options.run(options))
    except CommandError as error:
        return _fail(str(error), error.status)
    except (CheckpointError, RunFolderError, TrainingDiverged) as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS:
            raise
        return _fail(f"{error.name} is not installed. Run, in the checkout: pip install -e '.[demo]'", 1)
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail("there is not enough memory. Use a smaller --width, --depth or --batch-size", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthogonium",
        description="Train, certify, inspect and export 1-Lipschitz networks made of orthogonal layers.",
    )
    parser.add_argument("--version", action="version", version=f"orthogonium {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, certify, inspect, export):
        command.add_parser(commands).add_argument(
            "--threads",
            type=_count,
            default=1,
            metavar="N",
            help="CPU threads (default: 1, as more gain little here and the last digits depend on them)",
        )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    if int(text) > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_THREADS}, got {text}")
    return int(text)


def _fail(message: str, status: int) -> int:
    print(f"orthogonium: error: {' '.join(message.split())}", file=sys.stderr)
    return status
