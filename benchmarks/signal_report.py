"""What do the diagnostics cost, and how close are their estimates?

    python benchmarks/signal_report.py [--images FOLDER]

Prints the cost of a signal report in training steps, the error of the matrix-free Jacobian extremes on seven networks,
what a spectral monitor adds to training, and how the first step of Adam grows with width at one rate and at measured
ones. ``--images`` also draws the pictures of the documentation.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.diagnostics import jacobian_extremes
from orthogonium.diagnostics.layerwise_lr import update_sizes
from orthogonium.models import lipschitz_mlp

WIDTHS = (64, 128, 256, 512, 1024)


def seconds(function, repeats=5):
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def chain(width, depth, activation, out=10):
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), activation())]
    return nn.Sequential(*layers, nn.Linear(width, out))


def cost_of_reports():
    print("Signal report, MLP of width 256, batch 128, in forward and backward passes of the same batch:")
    x = torch.randn(128, 256)
    for depth in (8, 64):
        model = chain(256, depth, nn.ReLU)
        step = seconds(lambda model=model: model(x).sum().backward())
        times = {
            j: seconds(lambda m=model, j=j: og.signal_report(m, x, jacobian=j), 3) for j in ("none", "model", "layers")
        }
        print(f"  depth {depth}: " + ", ".join(f"jacobian={j!r} {t / step:.1f}" for j, t in times.items()))


def jacobian_errors():
    print("Jacobian extremes after 30 steps against the singular value decomposition (float64):")

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(24, 300, batch_first=True)

        def forward(self, x):
            return self.lstm(x[None])[0][0, -1]

    torch.manual_seed(0)
    nets = {
        "tanh MLP": (chain(400, 4, nn.Tanh, 300), (400,)),
        "ReLU MLP, deep": (chain(320, 30, nn.ReLU, 300), (320,)),
        "GELU, wide": (nn.Sequential(nn.Linear(300, 900), nn.GELU(), nn.Linear(900, 500)), (300,)),
        "CNN": (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3)), (1, 3, 16, 16)),
        "orthogonal MLP": (lipschitz_mlp(400, 300, width=400, depth=4), (1, 400)),
        "LSTM": (Recurrent(), (20, 24)),
        "transformer": (nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True), (1, 8, 48)),
    }
    for name, (net, shape) in nets.items():
        net = net.double()
        x = torch.randn(shape, dtype=torch.float64)
        start = time.process_time()
        found = jacobian_extremes(net, x)
        took = time.process_time() - start
        exact = jacobian_extremes(net, x, dense=10**6)
        print(
            f"  {name}: largest off by {abs(found.largest / exact.largest - 1):.1e}, smallest {found.smallest:.3g} "
            f"for {exact.smallest:.3g}, {took:.2f} s"
        )


def cost_of_monitors():
    print("Spectral monitor, share added to 100 training steps (batch 128, Adam):")
    nets = {
        "MLP 4 × 512": (chain(512, 4, nn.ReLU), torch.randn(128, 512)),
        "orthogonal MLP 4 × 256": (lipschitz_mlp(256, 10, 256, 4), torch.randn(128, 256)),
        "CNN": (
            nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
                nn.Linear(32 * 49, 10),
            ),
            torch.randn(128, 3, 16, 16),
        ),
    }  # fmt: skip
    for name, (model, x) in nets.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step(model=model, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        monitor = og.SpectralMonitor(model, lambda *_: None)
        step()
        plain, record = seconds(step, 15), seconds(monitor.record, 9)
        monitor.remove()
        print(
            f"  {name}: one record costs {record / plain:.2f} steps; every 100 steps {100 * record / plain / 100:.2f} %"
        )


def mlp(width):
    return nn.Sequential(
        nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def width_problem():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 32, generator=generator), torch.randint(10, (64,), generator=generator)
    return x, lambda output: F.cross_entropy(output, y)


def growth_with_width():
    print("First step of Adam on a batch: change of the outputs at width 1024 over width 64, by layer:")
    x, loss = width_problem()
    z, fresh_loss = torch.randn(64, 32), width_problem()[1]
    at_one_rate, measured = {}, {}
    for width in (64, 1024):
        torch.manual_seed(0)
        model = mlp(width)
        rates = {group["name"]: group["lr"] for group in og.layerwise_lr(model, x, loss)}
        names = {module: name for name, module in model.named_modules()}
        sizes = {names[module]: size for module, size in update_sizes(model, z, fresh_loss).items()}
        at_one_rate[width] = sizes
        measured[width] = {name: size * rates[name] for name, size in sizes.items()}
    for label, found in (("at one rate", at_one_rate), ("at measured rates, other batch", measured)):
        print(f"  {label}: " + ", ".join(f"{found[1024][n] / found[64][n]:.2f}" for n in found[64]))


def faulty():
    torch.manual_seed(0)
    layers = []
    for number in range(9):
        layers += [nn.Linear(64, 64), nn.Tanh() if number == 6 else nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
        model[8].bias[:48] = -100.0
        model[12].bias.copy_(torch.where(torch.arange(64) % 2 == 0, 9.0, -9.0))
    return model


def draw(folder):
    torch.manual_seed(0)
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    report = og.signal_report(faulty(), x, lambda output: F.cross_entropy(output, y))
    print(report)
    report.plot(folder / "signal_report.png")
    x, loss = width_problem()
    plain = og.coordinate_check(mlp, WIDTHS, x, loss)
    rated = og.coordinate_check(
        mlp, WIDTHS, x, loss, optimizer=lambda model: torch.optim.Adam(og.layerwise_lr(model, x, loss))
    )
    print(plain, rated, sep="\n")
    plain.plot(folder / "coordinate_check.png")
    rated.plot(folder / "coordinate_check_rated.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cost_of_reports()
    jacobian_errors()
    cost_of_monitors()
    growth_with_width()
    if options.images is not None:
        draw(options.images)


if __name__ == "__main__":
    main()
