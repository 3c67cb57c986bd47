"""``layer.weight = W`` gives ``W`` back where it is orthogonal, and the nearest orthogonal matrix where it is not."""

import pytest
import torch

from orthogonium.layers import OrthoLinear, UnitNormLinear
from orthogonium.reparametrizers import PRESETS
from tests.helpers import (
    DTYPES,
    SKEW_TYPE,
    STARTS,
    constraint,
    contract,
    gaussian,
    orthogonal_matrix,
    polar_reference,
    random_matrix,
)

SIZES = [(1, 1), (4, 4), (3, 7), (7, 3), (64, 64)]


def spectral(matrix):
    return torch.linalg.matrix_norm(matrix.double(), ord=2).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_orthogonal_weights_come_back(preset, dtype):
    for out_features, in_features in SIZES:
        layer = OrthoLinear(in_features, out_features, ortho_params=PRESETS[preset], dtype=dtype)
        for seed in range(3):
            weight = orthogonal_matrix((out_features, in_features), dtype=dtype, seed=seed)
            weight = -weight if seed == 1 else weight  # either sign of the determinant
            layer.weight = weight
            assert spectral(layer.weight - weight) <= contract(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_other_weights_are_projected(preset, dtype):
    for out_features, in_features in SIZES:
        layer = OrthoLinear(in_features, out_features, ortho_params=PRESETS[preset], dtype=dtype)
        weight = random_matrix((out_features, in_features), singular_values=(0.3, 3), dtype=dtype, seed=0)
        layer.weight = weight
        assert spectral(layer.weight - polar_reference(weight)) <= 10 * contract(weight)  # ten is the condition number


@pytest.mark.parametrize("preset", PRESETS)
def test_batched_right_inverse(preset):
    shape = (2, 3, 5, 4)
    made = constraint(preset, shape)
    weight = orthogonal_matrix(shape)
    torch.testing.assert_close(made(made.right_inverse(weight)), weight, rtol=0, atol=contract(weight))


@pytest.mark.parametrize(
    "start", ["zero", "rank_one", "rank_deficient", "tiny", "huge", "subnormal", "condition_worst"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_any_finite_weight_can_be_assigned(preset, start):
    layer = OrthoLinear(5, 3, ortho_params=PRESETS[preset])
    layer.weight = STARTS[start]((3, 5), torch.float32)
    assert spectral(layer.weight @ layer.weight.mT - torch.eye(3)) <= contract(layer.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_bad_weights_are_refused_and_leave_the_layer_as_it_was(preset):
    layer = OrthoLinear(5, 3, ortho_params=PRESETS[preset]).eval()
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.weight = torch.full((3, 5), float("nan"))
    with pytest.raises((TypeError, ValueError), match=r"shape|floating"):
        layer.weight = torch.ones(3, 4)
    with pytest.raises(TypeError):
        layer.weight = torch.ones(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="float64"):
        layer.weight = random_matrix((3, 5), singular_values=(1, 1), dtype=torch.float64, seed=0)
    with pytest.raises(TypeError, match="must be a tensor, got None"):
        layer.weight = None
    assert torch.equal(layer.eval().weight, before)


@pytest.mark.parametrize("preset", SKEW_TYPE)
def test_assignment_moves_the_base_and_training_goes_on_from_there(preset):
    layer = OrthoLinear(4, 4, ortho_params=PRESETS[preset])
    target = orthogonal_matrix((4, 4), dtype=torch.float32, seed=5)
    layer.weight = target
    assert not layer.parametrizations.weight.original.any()
    (layer.weight * gaussian((4, 4), dtype=torch.float32)).sum().backward()
    assert layer.parametrizations.weight.original.grad.norm() > 0


def test_assignment_in_evaluation_mode_is_seen_at_once():
    for layer in (OrthoLinear(4, 4).eval(), UnitNormLinear(4, 4).eval()):
        layer(torch.ones(4))
        target = orthogonal_matrix((4, 4), dtype=torch.float32, seed=5)
        layer.weight = target
        torch.testing.assert_close(layer(torch.ones(4)) - layer.bias, target @ torch.ones(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", SKEW_TYPE)
def test_a_checkpoint_with_a_broken_base_is_refused(preset):
    state = OrthoLinear(4, 4, ortho_params=PRESETS[preset]).state_dict()
    state["parametrizations.weight.0.orthogonalizer.base"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        OrthoLinear(4, 4, ortho_params=PRESETS[preset]).load_state_dict(state)
