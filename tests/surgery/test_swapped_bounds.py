"""From an ordinary model to a bound that is true: converted with swaps, trained a little, traced and certified."""

import math

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.surgery import LIPSCHITZ_SWAPS
from tests.surgery.zoo import Block, build


def convex(block: Block) -> nn.Module:
    """The block of :mod:`tests.surgery.zoo` with a convex combination in place of its sum."""
    branch = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
    return nn.Sequential(og.ConvexResidual(branch, shortcut=block.downsample), nn.ReLU())


CONVEX = {**LIPSCHITZ_SWAPS, Block: convex}
# name, swaps, whether the sums or joins that remain are known to leave at most this
CASES = {
    "mlp": ("mlp", LIPSCHITZ_SWAPS, 1.0),
    "resnet": ("resnet", LIPSCHITZ_SWAPS, 16 / 4),  # four sums, and a mean of 4×4 pixels
    "resnet_convex": ("resnet", CONVEX, 1 / 4),
    "unet": ("unet", LIPSCHITZ_SWAPS, math.sqrt(2)),
}


def converted(case):
    name, swaps, limit = CASES[case]
    model, x = build(name)
    model(x)  # running statistics of its own
    report = og.convert(model, swaps=swaps, input_shape=x.shape[1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(x)
        apart = torch.arange(outputs.shape[1]).view(-1, *(1,) * (outputs.ndim - 2))  # so that margins grow
        (outputs - apart).square().mean().backward()
        optimizer.step()
    return model.eval(), x, report, limit


def steepest(model, shape):
    """The largest slope seen: between far and near pairs, and of the Jacobian at several points."""
    network = og.certification.plain_network(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, *shape, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, 24, dtype=torch.float64).view(-1, *(1,) * len(shape))
    near = x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for other in (x.roll(1, 0), near, torch.zeros_like(x)):
            apart = (network(x) - network(other)).flatten(1).norm(dim=1)
            found += (apart / (x - other).flatten(1).norm(dim=1)).tolist()
    for point in x[::8]:
        jacobian = torch.autograd.functional.jacobian(lambda p: network(p[None]).flatten(), point)
        found.append(float(torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2)))
    return max(found)


@pytest.mark.parametrize("case", CASES)
def test_the_bound_of_a_converted_model_is_small_and_true(case):
    model, x, report, limit = converted(case)
    assert "swapped" in {row.action for row in report.changed} or case in ("mlp", "unet")
    bound = og.lipschitz_bound(model, tuple(x.shape[1:])).bound
    slope = steepest(model, tuple(x.shape[1:]))
    assert 0 < slope <= bound <= limit * (1 + 1e-4)
    assert report.bound_after is not None
    assert report.bound_after <= limit * (1 + 1e-4)


def test_residual_blocks_are_swapped_after_their_parts():
    model, x, report, _ = converted("resnet_convex")
    rows = {row.name: row for row in report.rows}
    assert list(rows)[: list(rows).index("layer1.0.bn1") + 1][-2:] == ["layer1.0", "layer1.0.bn1"]
    assert (rows["layer1.0"].action, rows["layer1.0"].detail) == ("swapped", "for Sequential")
    assert not any(isinstance(module, Block | nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, og.ConvexResidual) for module in model.modules()) == 4
    assert set(model.layer1._modules) == {"0", "1"}
    assert set(model.layer1[0]._modules) == {"0", "1"}
    torch.testing.assert_close(og.export(model)(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["resnet", "resnet_convex"])
def test_a_converted_classifier_is_certified(case, precision):
    model, x, _, _ = converted(case)
    certificate = og.certify(model, x, precision=precision)
    bound = og.lipschitz_bound(model, tuple(x.shape[1:])).bound
    assert certificate.holds().all()
    if precision == torch.float64 or case == "resnet_convex":  # four sums of float32 numbers cost most of the radius
        assert (certificate.error < 0.05 * certificate.margin).all()
        assert (certificate.radius >= 0.8 * certificate.margin / (math.sqrt(2) * bound)).all()
    network = og.certification.plain_network(model)
    for image, label, radius in zip(x.double(), certificate.prediction, certificate.radius, strict=True):
        result = og.attack(network, image[None], label[None], eps=float(radius), steps=5, restarts=1)
        assert not result.success.any()
