import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthogonium.certification import attack, certified_accuracy, certify
from orthogonium.certification.certificates import _forward_error
from orthogonium.certification.sequential import plain_network, read_sequential
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
    links = read_sequential(model)
    x = scale * torch.randn(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    computed = plain_network(links)(x)[0].tolist()
    exact = [Fraction(v) for v in x[0].tolist()]
    for link in links:
        if isinstance(link.plain, nn.Linear):
            rows, bias = link.plain.weight.tolist(), link.plain.bias.tolist()
            exact = [
                sum((Fraction(w) * v for w, v in zip(row, exact, strict=True)), Fraction(b))
                for row, b in zip(rows, bias, strict=True)
            ]
        elif isinstance(link.plain, MaxMin):
            pairs = zip(exact[::2], exact[1::2], strict=True)
            exact = [value for a, b in pairs for value in (max(a, b), min(a, b))]
    off = math.sqrt(sum(float(Fraction(c) - e) ** 2 for c, e in zip(computed, exact, strict=True)))
    error = _forward_error(links, [1] * len(links), x.norm(dim=1)).item()
    assert off <= error <= 1e-11 * max(1, scale)  # biases do not shrink with the input


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_changes_a_certified_prediction(seed):
    model = small_network(seed)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result = certify(model, x)
    network = plain_network(read_sequential(model))
    for i in range(0, 40, 4):
        point = x[i : i + 1], result.prediction[i : i + 1]
        assert not attack(network, *point, eps=result.radius[i].item(), steps=30, restarts=3).success.any()


def test_rounding_costs_almost_nothing_in_float64():
    model = small_network(0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    result = certify(model, x)
    weight = model[-1].weight.double()
    links = read_sequential(model)
    logits = plain_network(links)(x.double()).detach()
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


def test_bad_input_is_named():
    model = small_network(0)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        certify(model, torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"takes \(N, 6\), got \(1, 2, 4\)|takes \(N, 6\), got \(1, 8\)"):
        certify(model, torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"got \(6,\)\. For one input use x\[None\]"):
        certify(model, torch.ones(6))
    with pytest.raises(ValueError, match="dim=-2, which mixes the batch"):
        certify(nn.Sequential(MaxMin(dim=-2)).eval(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="start_dim=-2, which merges the batch"):
        certify(nn.Sequential(nn.Flatten(-2)).eval(), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        certify(model, torch.ones(2, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0 … 3, got 4 … 4"):
        certify(model, torch.ones(1, 6), torch.tensor([4]))
    with pytest.raises(TypeError, match=r"integer classes, got torch\.float32"):
        certify(model, torch.ones(1, 6), torch.ones(1))
    with pytest.raises(ValueError, match="at least 2 classes"):
        certify(nn.Sequential(nn.Linear(6, 1)).eval(), torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        certify(small_network(0).train(), torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        certified_accuracy(model, (torch.ones(1, 6), torch.tensor([0])), eps=(-0.1,))
    with pytest.raises(ValueError, match="no inputs"):
        certified_accuracy(model, [])
