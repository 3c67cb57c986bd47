"""``orthogonium certify``: prove again what a run folder claims."""

import argparse
from pathlib import Path

import torch
from torch import nn

from orthogonium.certification import NetworkBound, lipschitz_bound
from orthogonium.cli.errors import CommandError
from orthogonium.cli.loading import load_run
from orthogonium.cli.show import bound_table, certified_table, console
from orthogonium.training import Evaluation, evaluate, load_digits
from orthogonium.training.evaluation import RADII


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "certify",
        help="recompute the certificates of a run and say what is proved",
        description="Recompute every certificate of a run from its checkpoint and say what is proved.",
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="run folder written by train")
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII), metavar="R", help="ℓ2 radii")
    parser.add_argument(
        "--precision",
        choices=["float64", "float32"],
        default="float64",
        help="of the evaluation that the proof speaks of (default: float64)",
    )
    parser.add_argument("--attack", action="store_true", help="also attack every image at each radius")
    parser.add_argument("--steps", type=int, default=100, help="gradient steps of the attack (default: 100)")
    parser.add_argument("--restarts", type=int, default=10, help="starts of the attack (default: 10)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table and the statement; fail if an attack breaks a certificate."""
    for radius in options.radii:
        if not 0 < radius < float("inf"):
            raise CommandError(f"--radii must be finite and above 0, got {radius}", 2)
    for name in ("steps", "restarts"):
        if getattr(options, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(options, name)}", 2)
    model, config = load_run(options.path)
    split = load_digits(config.evaluate_on, config.split_seed)
    radii = sorted(set(options.radii))
    result = evaluate(
        model,
        split.x_eval,
        split.y_eval,
        radii,
        attack_steps=options.steps if options.attack else 0,
        attack_restarts=options.restarts,
        precision=getattr(torch, options.precision),
    )
    bounds = lipschitz_bound(model, split.x_eval.shape[1:])
    out = console()
    title = f"{len(split.y_eval)} {config.evaluate_on} images of {options.path}"
    out.print(title, style="bold", markup=False, soft_wrap=True)
    out.print(certified_table(result, radii))
    out.print(bound_table(bounds))
    out.print(_statement(model, result, bounds, options.precision))
    if options.attack:
        if result.broken:
            raise CommandError(f"the attack broke {result.broken} certificates: this is a bug, please report it")
        out.print(
            f"\nPGD with {options.steps} steps from {options.restarts} starts per image and radius "
            f"changed no certified prediction."
        )
    return 0


def _statement(model: nn.Module, result: Evaluation, bounds: NetworkBound, precision: str) -> str:
    median = float(result.certificate.radius.median())
    error = float(result.certificate.error.max())
    stored = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return (
        f"[bold]Proved[/bold]: the network is {result.lipschitz_bound:.9f}-Lipschitz for the ℓ2 norm. For "
        f"each image counted at a radius, no input within that distance, valid image or not, gets another "
        f"prediction. The median image is safe up to {median:.3f}.\n"
        f"[bold]How[/bold]: one constant for each of the {len(bounds.layers)} calls above, each weight's norm "
        f"verified from above; radius = smallest margin over ‖w_i − w_j‖ times the bound of the layers before. What "
        f"rounding can do to the logits, here and at the attacked input, is at most {error:.1e} and is taken off "
        f"first; every step is rounded down.\n"
        f"[bold]Assuming[/bold]: the weights ({', '.join(sorted(stored))}) that the checkpoint gives here, evaluated "
        f"in {precision} with round to nearest and conventional sums in any order; dropout off; pixels divided by 16 "
        f"as in training; no other processing of the input."
    )
