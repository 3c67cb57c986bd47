"""What certificates are not given for: data, labels and models that do not fit, each named with what would."""

import pytest
import torch
from torch import nn

from orthogonium.certification import Response, Rounding, certified_accuracy, certify, lipschitz_rule
from orthogonium.certification.rules import registry
from orthogonium.layers import MaxMin
from tests.certification.test_certificates import linear, small_network


def test_a_batch_of_one_that_loses_its_axis_is_named():
    class Squeezed(nn.Module):
        def forward(self, x):
            return x.squeeze()

    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]]), Squeezed()).eval()
    assert (certify(model, torch.tensor([[3.0, 1.0], [0.0, 1.0]])).radius > 0).all()
    with pytest.raises(ValueError, match=r"1 \(squeeze\) gives \(2,\) for 1 inputs.*Use squeeze\(dim\)"):
        certify(model, torch.tensor([[3.0, 1.0]]))


def test_bad_data_are_named():
    model, x, labels = small_network(0), torch.randn(3, 6), torch.tensor([0, 1, 2])
    assert certified_accuracy(model, [x, labels]) == certified_accuracy(model, (x, labels))
    assert list(certified_accuracy(model, (x, labels), eps=(r for r in (0.1, 0.2)))) == [0.1, 0.2]
    with pytest.raises(TypeError, match=r"pairs \(x, labels\), got dict"):
        certified_accuracy(model, [{"x": x, "labels": labels}])
    with pytest.raises(TypeError, match=r"pairs \(x, labels\), got 3 values"):
        certified_accuracy(model, [(x, labels, labels)])
    for eps in (0.5, "0.5", None):
        with pytest.raises(TypeError, match="eps must be a sequence of radii"):
            certified_accuracy(model, (x, labels), eps=eps)
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor of integer classes, got list"):
        certify(model, x, [0, 1, 2])
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got ndarray"):
        certify(model, x.numpy())
    with pytest.raises(ValueError, match="meta device"):
        certify(model, x.to("meta"))


def test_bad_input_is_named():
    model = small_network(0)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        certify(model, torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"takes \(N, 6\), got \('N', 8\)"):
        certify(model, torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"got \(6,\)\. For one input use x\[None\]"):
        certify(model, torch.ones(6))
    with pytest.raises(TypeError, match="which mixes the batch"):
        certify(nn.Sequential(MaxMin(dim=-2)).eval(), torch.ones(2, 2))
    with pytest.raises(TypeError, match="start_dim=-2, which merges the batch"):
        certify(nn.Sequential(nn.Flatten(-2)).eval(), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        certify(model, torch.ones(2, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0 … 3, got 4 … 4"):
        certify(model, torch.ones(1, 6), torch.tensor([4]))
    with pytest.raises(TypeError, match=r"integer classes, got torch\.float32"):
        certify(model, torch.ones(1, 6), torch.ones(1))
    with pytest.raises(ValueError, match=r"must give \(N, classes\), \(N, 1\) or \(N,\), got \(1, 2, 3\)"):
        certify(nn.Unflatten(1, (2, 3)).eval(), torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"precision must be torch\.float64 or torch\.float32, got torch\.float16"):
        certify(model, torch.ones(1, 6), precision=torch.float16)
    with pytest.raises(ValueError, match=r"Certify model\.float\(\)"):
        certify(small_network(0, torch.float64), torch.ones(1, 6), precision=torch.float32)
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        certify(small_network(0).train(), torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        certified_accuracy(model, (torch.ones(1, 6), torch.tensor([0])), eps=(-0.1,))
    with pytest.raises(ValueError, match="no inputs"):
        certified_accuracy(model, [])


def test_differences_that_overflow_and_denormal_radii_are_not_rounded_up():
    far = certify(nn.Identity().eval(), torch.tensor([[1e308, -1e308]], dtype=torch.float64))
    assert far.radius[0] <= 1.4142e308
    near = certify(nn.Identity().eval(), torch.tensor([[0.0, 5e-324]], dtype=torch.float64))
    assert near.radius[0] == 0


def test_an_error_that_does_not_depend_on_the_precision_counts_on_its_own(monkeypatch):
    class Coarse(nn.Module):
        def forward(self, x):
            return (4 * x).round() / 4

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    lipschitz_rule(Coarse)(lambda module, x: Response(1.0, Rounding(constant=0.125)))
    certificate = certify(Coarse().eval(), torch.ones(1, 2))
    assert certificate.error[0] >= 0.125 * 2**0.5
