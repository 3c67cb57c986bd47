import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from orthogonium.training import MarginCrossEntropy, MulticlassHinge


def test_margin_cross_entropy_against_the_formula():
    logits = torch.tensor([[1.0, 0.2, -0.5]], dtype=torch.float64)
    shifted = [4 * (1.0 - 0.3), 4 * 0.2, 4 * -0.5]
    expected = -shifted[0] + math.log(sum(math.exp(v) for v in shifted))
    loss = MarginCrossEntropy(temperature=4, offset=0.3)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_offset_moves_where_the_loss_is_balanced():
    logits = torch.tensor([[0.7, 0.0]])
    assert MarginCrossEntropy(10, 0.7)(logits, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-5)


def test_hinge_against_the_formula_and_zero_beyond_the_margin():
    logits = torch.tensor([[2.0, 1.5, 0.0], [0.0, 3.0, 1.0]])
    assert_close(MulticlassHinge(1.0)(logits, torch.tensor([0, 1])), torch.tensor(0.25))
    assert MulticlassHinge(0.4)(logits, torch.tensor([0, 1])) == 0


@pytest.mark.parametrize("loss", [MarginCrossEntropy(3.0, 0.5), MulticlassHinge(1.0)], ids=repr)
def test_gradients(loss):
    logits = torch.tensor([[0.3, 0.1, -0.2], [0.0, 0.5, 0.4]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: loss(z, torch.tensor([0, 2])), logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MarginCrossEntropy(0), "temperature must be a finite number above 0, got 0"),
        (lambda: MarginCrossEntropy(1, -1), "offset must be a finite number of at least 0, got -1"),
        (lambda: MulticlassHinge(math.nan), "margin must be a finite number above 0, got nan"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
