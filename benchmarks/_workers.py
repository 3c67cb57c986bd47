"""Contestants in processes of their own, which lets two libraries that share an import name run in one benchmark.

They take turns, so they can all run on the same core. On a shared machine they have to: cores differ by up to a factor
of 1.7 for minutes, and the system keeps each process on its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A script that answers one JSON request a line, asked over a pipe.

    Args:
        script: what to run.
        arguments: for the script.
        library: folder that ``orthogonium`` is imported from; by default this project's.
    """

    def __init__(self, script: Path, *arguments: str, library: str | Path | None = None) -> None:
        folder = ROOT if library is None else Path(library).resolve()
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(script), *arguments]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        if hasattr(os, "sched_setaffinity"):  # Linux; the threads that it will start inherit it
            os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the process replies.

        Raises:
            RuntimeError: it ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the measuring process ended at {request}")
        answer: dict[str, Any] = json.loads(reply)
        return answer
