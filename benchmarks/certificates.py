"""Do certificates hold when rounding decides, what do they give up for it, and what do they cost?

    python benchmarks/certificates.py [rounding] [digits] [cost] [resnet] [--tries N]

rounding: random perturbations at the certified radius, every coordinate rounded up or down at random, of networks and
inputs made for it; the same with naive certificates. digits: the radius given up to rounding. cost: of certifying 1,000
digits in forward passes. resnet: the bound of a network of the size of ResNet-18.
"""

import argparse
import statistics
import time

import torch
from _rounding_attack import attack_rounding, near_boundaries, networks
from torch import Tensor, nn

import orthogonium as og
from orthogonium.certification import certificates, plain_network
from orthogonium.models import lipschitz_mlp
from orthogonium.training import MarginCrossEntropy, load_digits


def rounding(tries: int, points: int = 200) -> None:
    """Flips inside of the certified radius, and inside of margin / Lipschitz constant."""
    print(f"\n{'network':34} {'precision':9} {'certified':>9} {'tries':>8} {'flips':>6}   naive: broken of certified")
    total = {torch.float32: [0, 0, 0, 0], torch.float64: [0, 0, 0, 0]}
    for dtype, sums in total.items():
        for name, model in networks(dtype).items():
            x = near_boundaries(model, points, dtype, seed=0)
            each = max(1, tries // (len(networks(dtype)) * points))
            naive = attack_rounding(model, x, 50, dtype, count_rounding=False)
            sound = attack_rounding(model, x, each, dtype)
            precision = str(dtype).removeprefix("torch.")
            print(
                f"{name:34} {precision:9} {sound.certified:9} {sound.tries:8} {sound.flips:6}   "
                f"{naive.broken} of {naive.certified}"
            )
            for k, value in enumerate((sound.tries, sound.flips, naive.broken, naive.certified)):
                sums[k] += value
    for dtype, (done, flips, broken, certified) in total.items():
        print(f"{dtype}: {flips} flips in {done} tries; naive certificates broken: {broken} of {certified}")


def trained(epochs: int = 20) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    digits = load_digits()
    model = lipschitz_mlp(64, 10, width=256, depth=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = MarginCrossEntropy(temperature=10, offset=1.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.x_train)).split(64):
            optimizer.zero_grad()
            loss(model(digits.x_train[batch]), digits.y_train[batch]).backward()
            optimizer.step()
    return model.eval(), digits.x_eval, digits.y_eval


def digits(epochs: int) -> None:
    """The largest and the median difference to the radius that exact arithmetic would give."""
    model, x, labels = trained(epochs)
    for precision in (torch.float64, torch.float32):
        certificate = og.certify(model, x, labels, precision=precision)
        network = certificates.analyse(model, x.shape[1:])
        with torch.no_grad():
            logits = plain_network(model)(x.double())
        top = logits.argmax(1)
        gaps = logits.gather(1, top[:, None]) - logits
        reach = certificates._reach(network, 10)[top]
        exact = (gaps / reach).nan_to_num(nan=float("inf")).masked_fill(reach == 0, float("inf")).amin(1)
        lost = (exact - certificate.radius)[top == labels]
        accuracy = og.certified_accuracy(model, (x, labels), precision=precision)
        shares = ", ".join(f"{radius:g}: {100 * share:.1f} %" for radius, share in accuracy.items())
        print(
            f"{precision}: given up to rounding: median {float(lost.median()):.2e}, most {float(lost.max()):.2e}; "
            f"error of the logits at most {float(certificate.error.max()):.2e}; certified {shares}"
        )


def timed(function, repeats: int) -> float:
    """Median process time."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def cost() -> None:
    """Process time of certifying 1,000 digits, in forward passes of the float64 network."""
    torch.manual_seed(0)
    x = torch.rand(1000, 64)
    for width, depth in ((256, 4), (512, 6)):
        model = lipschitz_mlp(64, 10, width=width, depth=depth).eval()
        plain, wide = plain_network(model), x.double()
        with torch.no_grad():
            forward = timed(lambda plain=plain, wide=wide: plain(wide), 20)
        network = certificates._network(model, x, certificates.BINARY64)
        certify = timed(lambda n=network: certificates._certify(n, x, None, certificates.BINARY64), 20)
        bound = timed(lambda m=model: og.lipschitz_bound(m, (64,)), 5)
        print(
            f"MLP {depth} × {width}: forward pass {1e3 * forward:.1f} ms, certifying {1e3 * certify:.1f} ms "
            f"({certify / forward:.2f} forward passes), the bound {1e3 * bound:.0f} ms"
        )


class Block(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = None
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


def resnet18() -> nn.Sequential:
    """The layers of ResNet-18 for 224 × 224 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers += [nn.MaxPool2d(3, 2, 1)]
    inner = 64
    for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inner, outer, stride), Block(outer, outer, 1)]
        inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def resnet() -> None:
    torch.manual_seed(0)
    model = resnet18().eval()
    for shape in ((3, 224, 224), (3, 32, 32)):
        start, wall = time.process_time(), time.perf_counter()
        result = og.lipschitz_bound(model, shape)
        print(
            f"ResNet-18, {shape}: bound {result.bound:.4g} over {len(result.layers)} calls in "
            f"{time.process_time() - start:.1f} s of process time ({time.perf_counter() - wall:.1f} s)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["rounding", "digits", "cost", "resnet", []], default=[])
    parser.add_argument("--tries", type=int, default=200_000, help="per precision, about")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.parts or ["rounding", "digits", "cost", "resnet"]
    if "rounding" in chosen:
        rounding(options.tries)
    if "digits" in chosen:
        digits(options.epochs)
    if "cost" in chosen:
        cost()
    if "resnet" in chosen:
        resnet()
