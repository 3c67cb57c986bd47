import torch
from torch import nn

from orthogonium.certification import certified_accuracy
from orthogonium.models import lipschitz_mlp
from orthogonium.training import evaluate
from orthogonium.training.evaluation import certified_curve
from orthogonium.training.layer_spectra import layer_spectra


def problem():
    torch.manual_seed(0)
    model = lipschitz_mlp(6, 4, width=8, depth=3).eval()
    x = torch.randn(40, 6)
    labels = model(x).argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    return model, x, labels


def test_the_attack_curve_lies_on_or_above_the_certified_one():
    model, x, labels = problem()
    radii = (0.05, 0.1, 0.3)
    result = evaluate(model, x, labels, radii, attack_steps=20, attack_restarts=2)
    assert result.clean_accuracy == 35 / 40
    assert result.certified == certified_accuracy(model, (x, labels), radii)
    for radius in radii:
        assert result.certified[radius] <= result.attacked[radius] <= result.clean_accuracy
    assert result.attacked[0.05] > result.attacked[0.3]
    assert result.broken == 0


def test_a_broken_certificate_would_be_counted(monkeypatch):
    model, x, labels = problem()
    norms = "orthogonium.certification.rules.linear.module_norms"
    monkeypatch.setattr(norms, lambda module, shape: (1e-3, 1.0))  # a bound that is far below the truth
    assert evaluate(model, x, labels, (0.3,), attack_steps=20).broken > 0


def test_no_steps_mean_no_attack():
    assert evaluate(*problem(), (0.1,), attack_steps=0).attacked == {}


def test_certified_curve_falls_from_clean_accuracy():
    model, x, labels = problem()
    result = evaluate(model, x, labels, (0.1,), attack_steps=0)
    curve = certified_curve(result.certificate, labels, torch.tensor([0.0, 0.1, 1e3]))
    assert curve.tolist() == [35 / 40, result.certified[0.1], 0.0]


def test_layer_spectra():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    (spectrum,) = layer_spectra(nn.Sequential(nn.Flatten(), layer))
    assert (spectrum.path, spectrum.shape) == ("1", (2, 3))
    torch.testing.assert_close(spectrum.singular_values, torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert spectrum.defect == 8.0
