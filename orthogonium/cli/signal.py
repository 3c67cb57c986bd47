"""``orthogonium inspect --signal``: how a run's network carries signals, in a table and a picture."""

import argparse
from pathlib import Path

from torch import nn

from orthogonium.cli.errors import CommandError
from orthogonium.cli.show import console
from orthogonium.diagnostics import signal_report
from orthogonium.training import MarginCrossEntropy, SavedModel, TrainConfig, load_digits

_BATCH = 256


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--signal",
        action="store_true",
        help="show activations, gradients, gains and faults of every layer on a batch of the run's data instead",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where --signal draws (default: RUN/signal.png)")


def check_flags(options: argparse.Namespace) -> None:
    """``CommandError`` for a picture that nothing is drawn into, or of an unknown format."""
    if options.plot is None:
        return
    if not options.signal:
        raise CommandError("--plot needs --signal", 2)
    if options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise CommandError(f"--plot must end in .png, .svg or .pdf, got {options.plot}", 2)
    if not options.plot.parent.is_dir():
        raise CommandError(f"--plot: there is no folder {options.plot.parent}", 2)


def show(model: nn.Module, config: TrainConfig | SavedModel, options: argparse.Namespace) -> int:
    """Print the report on the first images held out and draw it."""
    split = load_digits(config.evaluate_on, config.split_seed)
    x, y = split.x_eval[:_BATCH], split.y_eval[:_BATCH]
    criterion: nn.Module = nn.CrossEntropyLoss()  # a model of one's own comes without what it was trained with
    rate = 1.0
    if isinstance(config, TrainConfig):
        criterion, rate = MarginCrossEntropy(config.temperature, config.offset), config.learning_rate
    report = signal_report(model, x, lambda logits: criterion(logits, y), learning_rate=rate)
    path = options.plot or options.path / "signal.png"
    report.plot(path)
    out = console()
    title = f"{config.model}, preset {config.preset}, {len(x)} {config.evaluate_on} images"
    out.print(title, style="bold", markup=False, soft_wrap=True)
    out.print(str(report), markup=False, soft_wrap=True)
    out.print(f"\nPicture: {path}", markup=False, soft_wrap=True)
    return 0
