"""How many passes and how long does empirical initialisation take, and does it hold on other batches?

    python benchmarks/empirical_init.py [--older FOLDER] [--plot FILE]

Chains of ``--width`` linear layers with torch's default weights, tuned on one batch of 64 and measured on five others.
``--older`` names a folder that holds the package ``empirical_init`` 0.0.2, to be timed alongside up to depth
``--older-depth``. ``--plot`` draws sizes over depth before and after.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import orthogonium as og
from orthogonium.initialization import measure_scales

DEPTHS = (10, 50, 200)
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def chain(depth, activation, width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), ACTIVATIONS[activation]())))


def problem(width):
    return (lambda batch: torch.randn(batch, width)), (lambda output: (output * torch.randn_like(output)).mean())


def ours(depth, activation, width, repeats=5):
    """Passes, seconds, and the extremes of every size over layers and fresh batches."""
    get_input, get_loss = problem(width)
    seconds = []
    for _ in range(repeats):
        model = og.wrap_all_leaf_modules(chain(depth, activation, width))
        calls = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        wrappers = og.get_wrapped_submodules(model)
        start = time.process_time()
        report = og.empirical_init(wrappers, model, get_input, get_loss, generator=torch.Generator().manual_seed(1))
        seconds.append(time.process_time() - start)
        assert len(calls) == report.passes
    fresh = [
        measure_scales(wrappers, model, get_input, get_loss, generator=torch.Generator().manual_seed(seed))
        for seed in range(2, 7)
    ]
    sizes = {
        what: (min(f.extremes()[what][0] for f in fresh), max(f.extremes()[what][1] for f in fresh))
        for what in ("activation", "gradient", "update")
    }
    return report, statistics.median(seconds), sizes, model


def older(depth, activation, width):
    """Calls, seconds and activation extremes of the other package, on the same problem."""
    import empirical_init as other

    get_input, get_loss = problem(width)
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (other.Normed(nn.Linear(width, width)), ACTIVATIONS[activation]())]
    model, calls = nn.Sequential(*layers), []
    model.register_forward_hook(lambda *_: calls.append(1))
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        other.empirical_init(other.get_wrapped_submodules(model), model, get_input, get_loss)
    seconds = time.process_time() - start
    sizes = []
    for layer in layers[::2]:
        layer.register_forward_hook(lambda _, __, output: sizes.append(float(output.detach().square().mean().sqrt())))
    for _ in range(5):
        model(get_input(64))
    return len(calls) - 5, seconds, (min(sizes), max(sizes))


def plain(depth, width, repeats=5):
    """Passes and seconds of ``calibrate`` on ReLU chains, and activation extremes on other batches."""
    seconds = []
    for _ in range(repeats):
        model = chain(depth, "relu", width)
        start = time.process_time()
        report = og.calibrate(model, torch.randn(256, width))
        seconds.append(time.process_time() - start)
    sizes = []
    for layer in model[::2]:
        layer.register_forward_hook(lambda _, __, output: sizes.append(float(output.detach().square().mean().sqrt())))
    for _ in range(5):
        model(torch.randn(256, width))
    return report.passes, statistics.median(seconds), (min(sizes), max(sizes))


def span(pair):
    return "{:.3g} … {:.3g}".format(*pair)


def draw(path, width, depth=50):
    from orthogonium.diagnostics._figure import BLUE, GREY, ORANGE, figure

    get_input, get_loss = problem(width)
    with figure(path, 3, (10.0, 3.6)) as panels:
        default = og.wrap_all_leaf_modules(chain(depth, "relu", width))
        raw = measure_scales(og.get_wrapped_submodules(default), default, get_input, get_loss)
        *_, model = ours(depth, "relu", width, repeats=1)
        tuned = measure_scales(og.get_wrapped_submodules(model), model, get_input, get_loss)
        for axes, what in zip(panels, ("activation", "gradient", "update"), strict=True):
            for report, colour, label in ((raw, ORANGE, "torch's default"), (tuned, BLUE, "after empirical_init")):
                values = [getattr(row, f"{what}_rms") for row in report.modules]
                axes.plot(range(1, depth + 1), values, color=colour, label=label)
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set(title=f"{what.capitalize()}s", xlabel="layer", yscale="log")
        panels[0].set_ylabel("root mean square, another batch")
        panels[0].set_ylim(0.05, 2)
        panels[0].legend(loc="center right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--older", type=Path)
    parser.add_argument("--older-depth", type=int, default=50)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.older is not None:
        sys.path.insert(0, str(options.older))  # before this script, which has the same name
    print("| net | passes | CPU s | activations | gradients | updates | older: calls | CPU s | activations |")
    print("|---|---|---|---|---|---|---|---|---|")
    for activation in ACTIVATIONS:
        for depth in DEPTHS:
            report, seconds, sizes, _ = ours(depth, activation, options.width)
            row = [f"{activation} {depth}", str(report.passes), f"{seconds:.3f}", *map(span, sizes.values())]
            if options.older is not None and depth <= options.older_depth:
                calls, slow, spread = older(depth, activation, options.width)
                row += [str(calls), f"{slow:.2f}", span(spread)]
            else:
                row += ["", "", ""]
            print("| " + " | ".join(row) + " |", flush=True)
            for note in report.notes:
                print(f"  {activation} {depth}: {note}", file=sys.stderr)
    for depth in DEPTHS:
        passes, seconds, sizes = plain(depth, options.width)
        print(f"calibrate, relu {depth}: {passes} pass, {seconds:.3f} s, activations {span(sizes)}")
    if options.plot is not None:
        draw(options.plot, options.width)


if __name__ == "__main__":
    main()
