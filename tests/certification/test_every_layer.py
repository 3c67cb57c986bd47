"""Every public layer is known to the certificates, rounding included, or refused with a reason."""

import inspect

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium import layers
from orthogonium.certification.forward_error import check_rounding
from orthogonium.certification.network import analyse
from tests.certification.test_rules import cancelling, convex, trained

SIDES = {1: (6,), 2: (6, 6), 3: (4, 4, 4)}
PUBLIC = {name for name in layers.__all__ if inspect.isclass(getattr(layers, name))}
REFUSED = {
    "OrthoRNN": "slope depends on the state",
    "OrthoLSTM": "gates that depend on the input.*slope depends on the state",
    "OrthoGRU": "gates that depend on the input.*slope depends on the state",
}


def example(name):
    """A layer of this name, and the shape of one input."""
    made = getattr(layers, name)
    dims = int(name[-2]) if name[-1] == "d" else 0
    image = (2, *SIDES.get(dims, ()))
    if name in REFUSED:
        return made(3, 4, batch_first=True), (5, 3)
    if "Conv" in name and dims:
        return (made(2, kernel_size=3) if name.startswith("SLL") else made(2, 4, 3)), image
    if "Pool" in name:
        return made(2), image
    others = {
        "BatchCentering": (lambda: made(2), (2, 6)),
        "ConvexResidual": (lambda: made(og.OrthoLinear(6, 6)), (6,)),
        "GroupSort": (lambda: made(3), (6,)),
        "InvertibleDownsampling2d": (lambda: made(2), (2, 6, 6)),
        "InvertibleUpsampling2d": (lambda: made(2), (4, 6, 6)),
        "LayerCentering": (lambda: made(6), (6,)),
        "LipschitzBatchNorm": (lambda: made(2), (2, 6)),
        "MaxMin": (made, (6,)),
        "OrthoLinear": (lambda: made(6, 4), (6,)),
        "SLLLinear": (lambda: made(6, 4), (6,)),
        "UnitNormLinear": (lambda: made(6, 1), (6,)),
    }
    make, shape = others[name]
    return make(), shape


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_layer_is_known_or_refused_with_a_reason(name):
    torch.manual_seed(0)
    layer, shape = example(name)
    model = nn.Sequential(layer).eval()
    if name in REFUSED:
        with pytest.raises(TypeError, match=rf"^0 \({name}\) .*{REFUSED[name]}.*Certify the layers after it"):
            og.lipschitz_bound(model, shape)
        return
    network = analyse(model, shape)
    check_rounding(network)
    assert 0 < network.bound <= 1 + 2e-5


def test_wrong_sizes_are_refused():
    wrong = [
        (og.BatchCentering(3), (1, 4), "takes|unflatten"),
        (og.LipschitzBatchNorm(3), (1, 4), "takes|unflatten"),
        (og.LayerCentering((3, 4)), (4,), "takes"),
        (og.ScaledAvgPool2d(2), (4, 4), "takes"),
        (og.L2NormPool1d(2), (4, 4, 4), "takes"),
        (og.SLLLinear(3), (4,), "takes|cannot"),
        (og.SLLConv1d(3), (4, 4), "takes|cannot"),
    ]
    for layer, shape, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            og.lipschitz_bound(layer.eval(), shape)
    with pytest.raises(TypeError, match="Pass input_shape"):
        og.lipschitz_bound(og.LayerCentering(3).eval())
    for layer in (og.BatchCentering(3), og.LipschitzBatchNorm(3)):
        with pytest.raises(RuntimeError, match="unflatten"):
            layer(torch.zeros(2, 1, 4))  # no silent broadcasting to three channels


def test_convex_blocks_in_a_row_stay_at_one_where_sums_double():
    torch.manual_seed(0)
    branches = [nn.Sequential(og.OrthoLinear(6, 6, dtype=torch.float64), og.MaxMin()) for _ in range(20)]
    convex_bound = og.lipschitz_bound(nn.Sequential(*map(convex, branches)).eval(), (6,)).bound
    assert 1 <= convex_bound <= 1 + 1e-12
    expanding = convex(nn.Linear(6, 6).double(), 0.25)
    nn.init.eye_(expanding.branch.weight).data.mul_(3.0)
    share = float(expanding.alpha.detach())
    bound = og.lipschitz_bound(expanding.eval(), (6,)).bound
    assert bound == pytest.approx(1 - share + 3 * share, rel=1e-12)


def test_residual_blocks_with_steps_that_are_too_long_have_their_true_bound(monkeypatch):
    """What is proved is about the steps that the block takes, not about those that it should."""
    layer = trained(og.SLLLinear(5, 3, dtype=torch.float64)).double().eval()
    assert 1 <= og.lipschitz_bound(layer, (5,)).bound <= 1 + 1e-12
    right = og.SLLLinear._steps
    monkeypatch.setattr(og.SLLLinear, "_steps", lambda self, interactions: 2 * right(self, interactions))
    with torch.no_grad():
        layer.bias.fill_(1e3)  # all units on, at zero
        slope = torch.linalg.matrix_norm(torch.func.jacrev(layer)(torch.zeros(5, dtype=torch.float64)), 2)
    assert 1.2 < slope <= og.lipschitz_bound(layer, (5,)).bound <= 3 + 1e-12


def test_no_certificate_where_numbers_would_leave_float32():
    for change in (lambda m: m.weight.mul_(1e-12), lambda m: m.log_q[0].sub_(200)):
        layer = cancelling(trained(og.SLLLinear(6, 4)))
        with torch.no_grad():
            change(layer)
        assert og.lipschitz_bound(layer.eval(), (6,)).bound <= 1 + 1e-9
        with pytest.raises(TypeError, match="nothing is known about its rounding"):
            og.certify(layer, torch.zeros(1, 6))


@pytest.mark.parametrize("pool", [og.L2NormPool1d(4), nn.LPPool1d(2, 4)], ids=str)
def test_squares_that_overflow_or_vanish_certify_nothing(pool):
    model = nn.Sequential(pool, nn.Flatten()).eval()
    x = torch.tensor([[[4.0] * 4 + [1.0] * 4]]) * torch.tensor([1e20, 1e-30, 1.0]).view(3, 1, 1)
    assert model(x)[0].isinf().any()
    narrow = og.certify(model, x, precision=torch.float32)
    assert narrow.holds().tolist() == [False, False, True]
    assert og.certify(model, x).holds().tolist() == [True, False, True]
