"""``orthogonium inspect``: the layers of a run, by their singular values."""

import argparse
from pathlib import Path

from orthogonium.certification import lipschitz_bound
from orthogonium.cli import signal
from orthogonium.cli.loading import load_run
from orthogonium.cli.show import console
from orthogonium.training.data import FEATURES
from orthogonium.training.layer_spectra import layer_spectra


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help="show the singular values and the bound of every layer of a run",
        description="Show, for every layer of a run, its singular values, how far it is from orthogonal, and "
        "a verified bound on its norm.",
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="run folder written by train")
    signal.add_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print one row per linear layer, and the bound of the network."""
    from rich import box
    from rich.table import Table

    signal.check_flags(options)
    model, config = load_run(options.path)
    if options.signal:
        return signal.show(model, config, options)
    bounds = lipschitz_bound(model, (FEATURES,))
    by_path = {layer.path: layer for layer in bounds.layers}
    title = f"{config.model}, preset {config.preset}, {sum(p.numel() for p in model.parameters()):,} free numbers"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "type"):
        table.add_column(name, no_wrap=True)
    for name in ("weight", "σ min − 1", "σ max − 1", "defect", "bound − 1"):
        table.add_column(name, justify="right")
    for spectrum in layer_spectra(model):
        layer, values = by_path[spectrum.path], spectrum.singular_values
        table.add_row(
            spectrum.path,
            layer.kind,
            "{} × {}".format(*spectrum.shape),
            f"{float(values[-1]) - 1:+.2e}",
            f"{float(values[0]) - 1:+.2e}",
            f"{spectrum.defect:.2e}",
            f"{layer.constant - 1:+.2e}",
        )
    out = console()
    out.print(f"[bold]{title}[/bold]", soft_wrap=True)
    out.print(table)
    out.print("defect: ‖I − QQᵀ‖₂ on the shorter side; bound: verified, never below the norm")
    out.print(f"Lipschitz bound of the network: {bounds.bound:.9f}")
    return 0
