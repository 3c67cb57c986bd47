import pytest
import torch
from torch import nn

from orthogonium.certification import attack
from orthogonium.models import lipschitz_mlp


@pytest.fixture
def halves():
    """Class 0 where the first coordinate is positive: the boundary is at distance ``x[0]``."""
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    return model


def test_reaches_a_plane_just_inside_the_radius_and_no_plane_outside(halves):
    x = torch.tensor([[0.4, 1.0, 0.0], [0.6, 0.0, 2.0]], dtype=torch.float64)
    result = attack(halves, x, torch.tensor([0, 0]), eps=0.5, steps=20, restarts=2)
    assert result.success.tolist() == [True, False]
    assert ((result.adversarial - x).norm(dim=1) <= 0.5).all()
    assert halves(result.adversarial).argmax(1)[0] == 1


def test_misclassified_inputs_count_without_moving(halves):
    x = torch.tensor([[-0.1, 0.0, 0.0]], dtype=torch.float64)
    result = attack(halves, x, torch.tensor([0]), eps=0.0)
    assert result.success.all()
    assert torch.equal(result.adversarial, x)


def test_one_logit_is_pushed_across_zero():
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.4, 0.0], [-0.4, 1.0], [0.6, 0.0]], dtype=torch.float64)
    result = attack(model, x, torch.tensor([1, 0, 1]), eps=0.5, steps=20, restarts=1)
    assert result.success.tolist() == [True, True, False]


def test_labels_of_any_integer_type_mean_the_same():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    model.weight.data.fill_(1.0)
    x, labels = torch.tensor([[2.0], [-2.0]], dtype=torch.float64), torch.tensor([1, 0])
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.bool):
        assert not attack(model, x, labels.to(dtype), eps=0.5, steps=2, restarts=1).success.any()


def test_stays_in_the_ball_where_rounding_is_large_beside_it():
    torch.manual_seed(0)
    model, x = nn.Linear(100, 3), 100 * torch.rand(10, 100)
    found = attack(model, x, model(x).argmax(1), eps=1e-3, steps=10, restarts=2)
    distances = (found.adversarial.double() - x.double()).norm(dim=1)
    assert (distances <= 1e-3).all()
    assert (distances > 0.9e-3).any()


def test_inputs_are_checked(halves):
    with pytest.raises(TypeError, match=r"integer classes, got torch\.float32"):
        attack(halves, torch.ones(1, 3, dtype=torch.float64), torch.ones(1), 0.1)
    with pytest.raises(ValueError, match=r"0 … 1, got 2 … 2"):
        attack(halves, torch.ones(1, 3, dtype=torch.float64), torch.tensor([2]), 0.1)
    with pytest.raises(TypeError, match="one radius for all inputs"):
        attack(halves, torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        attack(halves, torch.ones(1, 3, dtype=torch.int64), torch.tensor([0]), 0.1)
    with pytest.raises(ValueError, match=r"labels must have shape \(1,\), got \(2,\)"):
        attack(halves, torch.ones(1, 3, dtype=torch.float64), torch.tensor([0, 1]), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stays_in_the_ball_for_images_and_leaves_the_model_alone(dtype):
    torch.manual_seed(0)
    model = lipschitz_mlp(16, 3, width=8, depth=2, dtype=dtype).eval()
    x = torch.rand(10, 1, 4, 4, dtype=dtype)
    labels = model(x).argmax(1)
    found = attack(model, x, labels, eps=0.3, steps=10, restarts=3)
    assert found.adversarial.shape == x.shape
    assert ((found.adversarial.double() - x.double()).flatten(1).norm(dim=1) <= 0.3 + torch.finfo(dtype).eps).all()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(found.adversarial).argmax(1) != labels, found.success)


def test_the_seed_decides(halves):
    x, labels = torch.ones(3, 3, dtype=torch.float64), torch.tensor([0, 0, 0])
    runs = [attack(halves, x, labels, 0.5, steps=3, restarts=2, seed=s).adversarial for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -1.0}, r"at least 0, got -1\.0"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": 1.0, "steps": 0}, "steps must be at least 1, got 0"),
        ({"eps": 1.0, "restarts": 0}, "restarts must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(halves, arguments, message):
    with pytest.raises(ValueError, match=message):
        attack(halves, torch.ones(1, 3, dtype=torch.float64), torch.tensor([0]), **arguments)
