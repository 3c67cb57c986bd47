"""``orthogonium train``: from data to a certified network in a run folder."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from orthogonium.cli.errors import CommandError
from orthogonium.cli.show import certified_table, console
from orthogonium.reparametrizers import PRESETS
from orthogonium.training import MODELS, RECIPES, EpochRecord, RunFolder, TrainConfig, Trainer, load_digits
from orthogonium.training.checkpoint import save_tensors
from orthogonium.training.evaluation import RADII, Evaluation, certified_curve, evaluate
from orthogonium.training.layer_spectra import layer_spectra
from orthogonium.training.loop import load_snapshot, save_snapshot
from orthogonium.training.plots import plot_certified_accuracy, plot_singular_values, plot_training
from orthogonium.training.run_folder import write_json

_ATTACK_RADII = tuple(sorted({*RADII, *(round(0.1 * i, 1) for i in range(1, 13)), 1.4, 1.6, 1.8, 2.0}))
_SAVE_EVERY = 10  # epochs


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a 1-Lipschitz network on digits, certify it, and write a run folder",
        description="Train a 1-Lipschitz network on scikit-learn's digits, certify its predictions and write "
        "checkpoint, metrics and plots. With no options: the recipe whose figures the documentation quotes.",
    )
    default = TrainConfig()
    say = parser.add_argument
    say("--preset", choices=list(PRESETS), metavar="NAME", help=f"orthogonalisation: {', '.join(PRESETS)}")
    say("--model", choices=list(MODELS), metavar="NAME", help=f"architecture: {', '.join(MODELS)}")
    say("--recipe", choices=list(RECIPES),
        help="balanced: best up to a radius of 0.5; radius: best beyond it (default: balanced)")  # fmt: skip
    say("--epochs", type=int, help=f"passes over the training data (default: {default.epochs})")
    say("--seed", type=int, help=f"of weights, batches and noise (default: {default.seed})")
    say("--width", type=int, help=f"features between layers, even (default: {default.width})")
    say("--depth", type=int, help=f"layers with weights (default: {default.depth})")
    say("--batch-size", type=int, help=f"images per step (default: {default.batch_size})")
    say("--learning-rate", type=float, help=f"largest rate of Adam (default: {default.learning_rate:g})")
    say("--temperature", type=float, help="sharpness of the loss (default: from the recipe)")
    say("--offset", type=float, help="margin that the loss asks for (default: from the recipe)")
    say("--noise", type=float, help="standard deviation added to pixels (default: from the recipe)")
    say("--evaluate-on", choices=["test", "validation"],
        help="validation: hold out part of the training data, for tuning (default: test)")  # fmt: skip
    say(
        "--out",
        type=Path,
        metavar="RUN",
        help="run folder, new or empty (default: runs/digits-PRESET-seedSEED)",
    )
    say(
        "--resume",
        action="store_true",
        help="go on with an interrupted run in --out; ends as if never interrupted",
    )
    say("--device", default="cpu", help="where to train, for example cpu or cuda (default: cpu)")
    say(
        "--attack-steps",
        type=int,
        default=40,
        help="steps of the attack shown in the plot; 0 for none (default: 40)",
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Train, evaluate, write the run folder and print the table."""
    device = _device(options.device)
    if options.attack_steps < 0:
        raise CommandError(f"--attack-steps must be at least 0, got {options.attack_steps}", 2)
    folder, config = _start(options)
    began = time.perf_counter()
    split = load_digits(config.evaluate_on, config.split_seed).to(device)
    trainer = Trainer(config.build_model().to(device), config, split)
    if options.resume:
        trainer.restore(load_snapshot(folder.unfinished, trainer))
    else:
        write_json(folder.config, config.to_dict())
    try:
        _save(folder, trainer)
        _train(trainer, folder)
        _save(folder, trainer)
    except KeyboardInterrupt:
        _save(folder, trainer)
        epoch = trainer.snapshot.epoch
        raise CommandError(
            f"interrupted after {epoch} of {config.epochs} epochs; saved in {folder.path}. "
            f"Go on with: python -m orthogonium train --resume --out {folder.path}",
            130,
        ) from None
    except Exception:
        _save(folder, trainer)
        raise
    model = trainer.model.cpu().eval()
    result = evaluate(model, split.x_eval, split.y_eval, _ATTACK_RADII, attack_steps=options.attack_steps)
    _write_results(folder, trainer, result, time.perf_counter() - began)
    _report(folder, config, result, time.perf_counter() - began)
    return 0


def _start(options: argparse.Namespace) -> tuple[RunFolder, TrainConfig]:
    """The folder and the config that the options ask for, both checked before anything is written."""
    given: dict[str, Any] = dict(RECIPES[options.recipe]) if options.recipe else {}
    given |= {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(TrainConfig)
        if getattr(options, field.name, None) is not None
    }
    try:
        config = TrainConfig(**{**RECIPES["balanced"], **given})
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), 2) from error
    path = options.out or Path("runs") / f"digits-{config.preset}-seed{config.seed}"
    if not options.resume:
        return RunFolder.create(path), config
    folder = RunFolder.open(path)
    config = folder.read_config()
    for name, value in given.items():
        if value != getattr(config, name):
            raise CommandError(
                f"--{name.replace('_', '-')} {value} differs from the run's {getattr(config, name)}. "
                f"Leave it out with --resume, or start a new run in another --out",
                2,
            )
    if not folder.unfinished.exists():
        raise CommandError(f"{path} has nothing to resume. Look at it with: python -m orthogonium inspect {path}", 2)
    return folder, config


def _device(name: str) -> torch.device:
    """The device called ``name``, known to work."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(f"--device {name} cannot be used here: {reason}. Try --device cpu", 2) from error
    return device


def _train(trainer: Trainer, folder: RunFolder) -> None:
    """Run the loop under a progress bar and save now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("training", total=trainer.config.epochs, completed=len(trainer.history), status="")

        def after_epoch(record: EpochRecord) -> None:
            status = f"loss {record.loss:.3f}  {trainer.config.evaluate_on} {100 * record.eval_accuracy:.1f} %"
            progress.update(task, completed=record.epoch, status=status)
            if record.epoch % _SAVE_EVERY == 0:
                _save(folder, trainer)

        trainer.run(after_epoch)


def _save(folder: RunFolder, trainer: Trainer) -> None:
    """Leave a loadable checkpoint, and what it takes to go on."""
    save_tensors(folder.model, trainer.snapshot.model)
    save_snapshot(folder.unfinished, trainer.snapshot)
    write_json(folder.history, [vars(record) for record in trainer.snapshot.history])


def _write_results(folder: RunFolder, trainer: Trainer, result: Evaluation, seconds: float) -> None:
    """Every file of a finished run; metrics come last, so that they mean that all is there."""
    _save(folder, trainer)
    labels = trainer.split.y_eval.cpu()
    radii = torch.linspace(0, 2, 401)
    curve = certified_curve(result.certificate, labels, radii)
    write_json(
        folder.curves,
        {
            "certified": {f"{r:.3f}": round(float(c), 6) for r, c in zip(radii, curve, strict=True)},
            "attacked": {str(r): value for r, value in result.attacked.items()},
        },
    )
    attacked = {0.0: result.clean_accuracy, **result.attacked} if result.attacked else {}
    plot_certified_accuracy(folder.path / "certified_accuracy.png", radii, curve, attacked, RADII)
    plot_training(folder.path / "training_curves.png", trainer.history, trainer.config.evaluate_on)
    plot_singular_values(folder.path / "singular_values.png", layer_spectra(trainer.model))
    write_json(
        folder.metrics,
        {
            "clean_accuracy": result.clean_accuracy,
            "certified_accuracy": {str(r): result.certified[r] for r in RADII},
            "lipschitz_bound": result.lipschitz_bound,
            "seconds": round(seconds, 3),
        },
    )
    folder.unfinished.unlink(missing_ok=True)


def _report(folder: RunFolder, config: TrainConfig, result: Evaluation, seconds: float) -> None:
    out = console()
    size = len(result.certificate.radius)
    title = f"{size} {config.evaluate_on} images, {config.model}, preset {config.preset}, seed {config.seed}"
    out.print(title, style="bold")
    out.print(certified_table(result, RADII))
    out.print(f"Lipschitz bound {result.lipschitz_bound:.9f}, {seconds:.0f} seconds")
    out.print(f"Files in {folder.path}: model.safetensors, config.json, metrics.json, 3 plots", soft_wrap=True)
    out.print(f"Next: python -m orthogonium certify {folder.path}", soft_wrap=True)
