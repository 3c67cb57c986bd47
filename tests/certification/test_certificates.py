import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthogonium.certification import (
    Response,
    Rounding,
    attack,
    certified_accuracy,
    certify,
    lipschitz_rule,
    plain_network,
)
from orthogonium.certification.rules import registry
from orthogonium.layers import MaxMin
from orthogonium.models import lipschitz_mlp


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None, dtype=torch.float64)
    layer.weight.data = torch.tensor(weight, dtype=torch.float64)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


def small_network(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return lipschitz_mlp(6, 4, width=8, depth=3, dtype=dtype).eval()


def test_a_linear_classifier_gets_its_exact_distance_to_the_boundary():
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [0.0, 0.0, -9.0])).eval()
    x = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    result = certify(model, x)
    assert result.prediction.tolist() == [0, 1]
    assert result.margin.tolist() == [2.0, 2.0]
    truth = torch.full((2,), 2 / math.sqrt(2), dtype=torch.float64)
    assert (result.radius <= truth).all()
    torch.testing.assert_close(result.radius, truth, rtol=1e-8, atol=0)


def test_a_constant_below_one_in_front_enlarges_the_radius():
    head = linear([[1.0, 0.0], [0.0, 1.0]])
    scaled = nn.Sequential(linear([[0.25, 0.0], [0.0, 0.25]]), head).eval()
    radius = certify(scaled, torch.tensor([[4.0, 0.0]])).radius
    assert radius.item() == pytest.approx(4 / math.sqrt(2), rel=1e-7)


def test_without_a_last_linear_layer_the_factor_is_root_two():
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]]), nn.Identity()).eval()
    assert certify(model, torch.tensor([[1.0, 0.0]])).radius.item() == pytest.approx(1 / math.sqrt(2), rel=1e-7)


def test_ties_nan_and_infinities_have_radius_zero():
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]])).eval()
    x = torch.tensor([[1.0, 1.0], [math.nan, 0.0], [math.inf, 0.0], [1e308, -1e308]])
    assert certify(model, x.double()).radius.tolist()[:3] == [0, 0, 0]


def test_equal_rows_can_never_be_told_apart():
    model = nn.Sequential(linear([[1.0, 2.0], [1.0, 2.0]], [1.0, 0.0])).eval()
    assert certify(model, torch.tensor([[0.3, 0.4]])).radius.item() > 1e6
    model[0].bias.data.zero_()
    assert certify(model, torch.tensor([[0.3, 0.4]])).radius.item() == 0


def test_labels_make_the_margin_signed_and_the_radius_zero_when_wrong():
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]])).eval()
    result = certify(model, torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
    assert result.margin.tolist() == [2.0, -2.0]
    assert result.radius[0] > 1
    assert result.radius[1] == 0


def test_last_ulp_margin_is_not_certified():
    """A margin smaller than the rounding of the sum behind it proves nothing."""
    model = nn.Sequential(linear([[1e8, 1.0], [1e8, 0.0]])).eval()
    assert certify(model, torch.tensor([[1.0, 2e-8]], dtype=torch.float64)).margin.item() > 0
    assert certify(model, torch.tensor([[1.0, 2e-8]], dtype=torch.float64)).radius.item() == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_forward_error_covers_the_distance_to_exact_arithmetic(seed, scale):
    model = small_network(seed)
    x = scale * torch.randn(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    computed = plain_network(model)(x)[0].tolist()
    exact = [Fraction(v) for v in x[0].tolist()]
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows, bias = layer.weight.tolist(), layer.bias.tolist()
            exact = [
                sum((Fraction(w) * v for w, v in zip(row, exact, strict=True)), Fraction(b))
                for row, b in zip(rows, bias, strict=True)
            ]
        elif isinstance(layer, MaxMin):
            pairs = zip(exact[::2], exact[1::2], strict=True)
            exact = [value for a, b in pairs for value in (max(a, b), min(a, b))]
    off = math.sqrt(sum(float(Fraction(c) - e) ** 2 for c, e in zip(computed, exact, strict=True)))
    error = certify(model, x).error.item()
    assert off <= error <= 1e-11 * max(1, scale)  # biases do not shrink with the input


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_changes_a_certified_prediction(seed):
    model = small_network(seed)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = certify(model, x)
    network = plain_network(model)
    for i in range(0, 40, 4):
        point = x[i : i + 1], result.prediction[i : i + 1]
        assert not attack(network, *point, eps=result.radius[i].item(), steps=30, restarts=3).success.any()


def test_rounding_costs_almost_nothing_in_float64():
    model = small_network(0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    result = certify(model, x)
    weight = model[-1].weight.double()
    logits = plain_network(model)(x.double()).detach()
    gaps = logits.gather(1, result.prediction[:, None]) - logits
    naive = (gaps / torch.cdist(weight, weight)[result.prediction]).nan_to_num(nan=math.inf).amin(1)
    assert (naive - result.radius).max() <= 1e-5


def test_certified_accuracy_of_pairs_and_of_a_loader_agree():
    model = small_network(1)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(50) % 4
    whole = certified_accuracy(model, (x, labels), eps=(0.0, 0.1, 0.5))
    batches = [(x[:20], labels[:20]), (x[20:], labels[20:])]
    assert certified_accuracy(model, batches, eps=(0.0, 0.1, 0.5)) == whole
    assert whole[0.0] == (certify(model, x).prediction == labels).double().mean().item()
    assert whole[0.0] >= whole[0.1] >= whole[0.5]


def test_an_empty_batch_has_no_certificates():
    assert certify(small_network(0), torch.zeros(0, 6)).radius.shape == (0,)


def test_a_single_logit_is_a_binary_classifier():
    for head in (nn.Identity(), nn.Flatten(0)):
        model = nn.Sequential(linear([[3.0, 4.0]], [-1.0]), nn.Identity()).eval()
        if isinstance(head, nn.Flatten):
            model = Reads(model)
        result = certify(model, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.25]]))
        assert result.prediction.tolist() == [1, 0, 0]
        truth = torch.tensor([6 / 5, 1 / 5, 0.0], dtype=torch.float64)
        torch.testing.assert_close(result.radius, truth, rtol=1e-7, atol=1e-8)
        assert (result.radius <= truth + 1e-8 * (truth == 0)).all()
        assert result.margin.tolist()[:2] == [6, 1]
        labelled = certify(model, torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        assert (labelled.margin.item(), labelled.radius.item()) == (-6, 0)


class Reads(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return self.model(x)[:, 0]


class Experts(nn.Module):
    """One network per class."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.eval()

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], 1)


def test_logits_from_separate_networks_use_the_constant_of_each():
    # the joint constant is √(16 + 1 + 1), times √2 is 6; between the last two classes it is 1 + 1
    model = Experts(linear([[4.0, 0.0]], [-100.0]), linear([[0.0, 1.0]]), linear([[0.0, -1.0]]))
    assert certify(model, torch.tensor([[0.0, 3.0]])).radius.item() == pytest.approx(6 / 2, rel=1e-7)


def test_scaling_inside_the_model_counts():
    class Normalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.register_buffer("mean", torch.tensor([0.5, 0.5]))
            self.register_buffer("std", torch.tensor([0.25, 0.5]))
            self.eval()

        def forward(self, x):
            return self.model((x - self.mean) / self.std)

    plain = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]]), nn.Identity()).eval()
    x = torch.tensor([[1.0, 0.0]])
    assert certify(Normalised(plain), x).radius.item() == pytest.approx((2 + 1) / math.sqrt(2) * 0.25, rel=1e-7)
    assert certify(Normalised(plain), x).lipschitz == pytest.approx(4, rel=1e-9)


def test_float32_costs_more_and_holds_in_float32():
    model = small_network(0)
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    double, single = certify(model, x), certify(model, x, precision=torch.float32)
    assert (single.radius <= double.radius).all()
    assert (single.radius > 0).double().mean() > 0.98
    assert (single.error > 1e4 * double.error).all()
    kept = single.radius > 0
    assert torch.equal(model(x).argmax(1)[kept], single.prediction[kept])


def test_holds_is_a_boolean_per_sample():
    result = certify(nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]])).eval(), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    assert result.holds().tolist() == [True, False]
    assert result.holds(1.4).tolist() == [True, False]
    assert result.holds(1.5).tolist() == [False, False]


def test_residual_and_convolutional_networks_have_radii_that_survive_attacks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))

        def forward(self, x):
            out = self.inner(x)
            out += x
            return nn.functional.avg_pool2d(out, 2)

    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 2, 3, padding="same"), Block(), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*parts).eval()
    x = torch.randn(20, 1, 4, 4, dtype=torch.float64)
    result = certify(model, x)
    assert (result.radius > 0).all()
    assert (result.error < 1e-13).all()
    network = plain_network(model)
    for i in range(0, 20, 4):
        point = x[i : i + 1], result.prediction[i : i + 1]
        assert not attack(network, *point, eps=result.radius[i].item(), steps=30, restarts=2).success.any()


def test_a_loader_is_read_once_and_bounded_once(monkeypatch):
    from orthogonium.certification import certificates

    traced = []
    analyse = certificates.analyse
    monkeypatch.setattr(certificates, "analyse", lambda *a: traced.append(a) or analyse(*a))
    model, x = small_network(0), torch.randn(30, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(30) % 4), batch_size=7)
    result = certified_accuracy(model, loader, eps=(0.0, 0.1), progress=True)
    assert len(traced) == 1
    assert result == certified_accuracy(model, (x, torch.arange(30) % 4), eps=(0.0, 0.1))


class Dropout(nn.Module):
    def forward(self, x):
        return 3 * x.flip(1)


@pytest.fixture
def own_rule(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    lipschitz_rule(Dropout)(lambda module, x: Response(3.0, Rounding(2, 3.0)))


def test_only_a_layer_that_returns_its_input_lets_the_last_weights_be_used(own_rule):
    first, x = linear([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), torch.tensor([[3.0, 1.0]])
    exact = certify(nn.Sequential(first, nn.Dropout(), nn.Identity()).eval(), x).radius.item()
    assert exact == pytest.approx(2 / math.sqrt(2), rel=1e-7)
    assert certify(nn.Sequential(first, Dropout()).eval(), x).radius.item() <= 1.5 / math.sqrt(2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=1000.1),
        lambda x: torch.clamp_max(x, -1000.1),
        lambda x: nn.functional.hardtanh(x, 1000.1, 2000.1),
        lambda x: nn.functional.threshold(x, 1000.1, 1000.1),
        lambda x: nn.functional.pad(x, (1, 1), value=1000.1),
        lambda x: torch.cat((x, torch.full_like(x, 1000.1)), 1),
        lambda x: torch.cat((x, x.new_full(x.shape, 1000.1)), 1),
    ],
)
def test_what_float32_does_to_limits_and_fillings_is_counted(function):
    class Call(nn.Module):
        def forward(self, x):
            return function(x)

    x = torch.randn(3, 4)
    off = (function(x).double() - function(x.double())).norm(dim=1)
    result = certify(Call().eval(), x, precision=torch.float32)
    assert (off > 1e-5).all()
    assert (off <= result.error).all()
    assert (result.error < 100 * off).all()


def test_limits_far_away_cost_next_to_nothing():
    model, x = small_network(0), torch.randn(5, 6)
    clamped = nn.Sequential(nn.Hardtanh(-1e30, 1e30), model).eval()
    errors = [certify(m, x, precision=torch.float32).error for m in (clamped, model)]
    assert (errors[0] < 1.5 * errors[1]).all()
