"""Will a linear layer survive a training script? 58 checks, for this library and its peers.

    python benchmarks/battery.py --peer PATH --out docs/benchmarks

Each contestant runs in a process of its own; ``--peer PATH`` is a folder with another library that imports as
``orthogonium``. An exception, a crash or a check that takes more than 200 seconds is a failure, with its reason.
"""

import argparse
import csv
import json
import os
import selectors
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 200


def serve(name: str, preset: str) -> None:
    """One contestant: read numbers of checks from standard input, answer each with a line of JSON."""
    import _battery_ranks
    import torch
    from _battery_contestants import Refused, contestant

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _battery_ranks.PRESET = preset
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # exporters print
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    subject, checks = contestant(name, preset), all_checks()

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no end after {LIMIT} seconds")

    signal.signal(signal.SIGALRM, too_long)
    for line in sys.stdin:
        reason = ""
        signal.alarm(LIMIT)
        try:
            torch.manual_seed(0)
            checks[int(line)][2](subject)
        except Refused as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        finally:
            signal.alarm(0)
        print(json.dumps(reason), file=answers, flush=True)


def all_checks() -> list[tuple[str, str, Callable[[Any], None]]]:
    """``(group, name, function)``; importing them imports torch."""
    import _battery_input
    import _battery_life
    import _battery_training

    groups: list[tuple[str, Any]] = [
        ("bad input", _battery_input.CHECKS),
        ("life cycle", _battery_life.CHECKS),
        ("training", _battery_training.CHECKS),
    ]
    return [(group, name, check) for group, checks in groups for name, check in checks]


class Process:
    """A contestant that is started anew when a check kills it."""

    def __init__(self, name: str, preset: str, path: str | None) -> None:
        self.command = [sys.executable, str(HERE / "battery.py"), "--serve", name, "--preset", preset]
        library = path if name == "peer" and path else str(HERE.parent)
        self.environment = {**os.environ, "PYTHONPATH": f"{library}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
        self.running: subprocess.Popen[str] | None = None

    def ask(self, number: int) -> str:
        """What is wrong; empty for a check that passes."""
        if self.running is None:
            self.running = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
            )
        process = self.running
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            reply = process.stdout.readline() if selector.select(LIMIT + 60) else ""
        if reply:
            found: str = json.loads(reply)
            return found
        self.stop()
        return "the process hung or died"

    def stop(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()
            self.running = None


def main() -> None:
    from _battery_contestants import NAMES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer", help="folder of a library that imports as orthogonium")
    parser.add_argument("--preset", default="default", help="of our own layers")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these contestants")
    parser.add_argument("--checks", nargs="+", help="only checks whose names contain one of these")
    parser.add_argument("--out", type=Path, help="folder for battery.csv")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.preset)
        return
    names = arguments.only or [name for name in NAMES if name != "peer" or arguments.peer]
    checks = all_checks()
    chosen = [
        i for i, (_, name, _) in enumerate(checks) if not arguments.checks or any(c in name for c in arguments.checks)
    ]
    reasons: dict[str, dict[int, str]] = {}
    for name in names:
        process = Process(name, arguments.preset, arguments.peer)
        try:
            reasons[name] = {i: process.ask(i) for i in chosen}
        finally:
            process.stop()
    show(names, [(i, *checks[i][:2]) for i in chosen], reasons)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with (arguments.out / "battery.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["group", "check", *names])
            for i in chosen:
                writer.writerow([*checks[i][:2], *(reasons[name][i] or "pass" for name in names)])


def show(names: list[str], checks: list[tuple[int, str, str]], reasons: dict[str, dict[int, str]]) -> None:
    """The table, why each check failed, and the scores."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=150)
    table = Table("group", "check", *names)
    for i, group, check in checks:
        table.add_row(group, check, *("[red]fail[/]" if reasons[name][i] else "pass" for name in names))
    scores = (f"{sum(not reasons[name][i] for i, _, _ in checks)} of {len(checks)}" for name in names)
    table.add_row("", "score", *scores, style="bold")
    console.print(table)
    for name in names:
        for i, _, check in checks:
            if reasons[name][i]:
                console.print(f"{name}, {check}: {escape(reasons[name][i])}", highlight=False)


if __name__ == "__main__":
    main()
