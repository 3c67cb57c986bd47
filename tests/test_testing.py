"""The test kit tells good layers from bad ones, and says what is wrong."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import orthogonium as og
from orthogonium.certification import lipschitz_bound
from orthogonium.testing import assert_lipschitz, assert_orthogonal, kernels, layers, materialise, matrices
from tests.operators import materialise as reference


def scaled(factor):
    layer = nn.Linear(3, 3)
    nn.init.eye_(layer.weight).data.mul_(factor)
    return layer


def test_operators_are_written_out():
    layer = og.OrthoConv2d(2, 4, 3, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(materialise(layer, (2, 4, 4)), reference(layer, (4, 4)), rtol=0, atol=1e-13)
    assert layer.training
    with pytest.raises(ValueError, match="ReLU is not affine"):
        materialise(nn.ReLU(), (3,))
    with pytest.raises(ValueError, match="too large"):
        materialise(nn.Identity(), (9000,))


@pytest.mark.parametrize("layer", [og.OrthoLinear(6, 4), og.OrthoLinear(4, 6, dtype=torch.float64)])
def test_orthogonal_layers_pass(layer):
    assert_orthogonal(layer, (layer.in_features,))
    assert_orthogonal(layer.weight)
    assert_lipschitz(layer, (layer.in_features,), 1)


def test_messages_name_the_largest_singular_value():
    with pytest.raises(AssertionError, match=r"Linear on .* not orthogonal: σ_max = 1\.5, σ_min"):
        assert_orthogonal(scaled(1.5), (3,))
    with pytest.raises(AssertionError, match=r"shape \(2, 2\) is not orthogonal: σ_max = 1, σ_min = 0"):
        assert_orthogonal(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(AssertionError, match=r"Linear on .* \(3,\) has σ_max = 1\.5, above the promised 1"):
        assert_lipschitz(scaled(1.5), (3,))
    assert_lipschitz(scaled(1.5), (3,), 1.5)


def test_curved_modules_are_proved_or_probed():
    assert_lipschitz(nn.Sequential(scaled(2.0), nn.ReLU()), (3,), 2.0)
    with pytest.raises(AssertionError, match=r"Jacobian with σ_max = 2|grows a distance by"):
        assert_lipschitz(nn.Sequential(scaled(2.0), nn.LeakyReLU(0.5)), (3,), 1.9)
    assert_lipschitz(nn.LayerNorm(3, eps=1.0), (3,), 1.0)  # no rule, no counterexample
    with pytest.raises(AssertionError, match="GLU"):
        assert_lipschitz(nn.GLU(1), (4,), 0.5)


class Kinked(nn.Module):
    """The identity near zero, and a hundred times as steep further out."""

    def forward(self, x):
        return x + 100 * torch.relu(x - 50)


def test_a_kink_far_out_is_found():
    with pytest.raises(ValueError, match="Kinked is not affine"):
        materialise(Kinked(), (4,))
    with pytest.raises(AssertionError, match="Kinked"):
        assert_lipschitz(Kinked(), (4,), 1.0)


def test_nothing_and_nan_are_no_surprise():
    assert materialise(nn.Linear(4, 0), (4,)).shape == (0, 4)
    assert materialise(nn.Linear(0, 4), (0,)).shape == (4, 0)
    with pytest.raises(AssertionError, match="holds NaN"):
        assert_orthogonal(torch.full((2, 2), float("nan")))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="input_shape is needed"):
        assert_orthogonal(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        assert_orthogonal(torch.ones(3))


@settings(max_examples=30)
@given(matrix=matrices())
def test_matrices_have_their_bound(matrix):
    assert matrix.ndim == 2
    truth = torch.linalg.matrix_norm(matrix.double(), 2)
    assert og.spectral_norm_bound(matrix) >= truth * (1 - 1e-14)


@settings(max_examples=20)
@given(drawn=kernels(dims=1))
def test_kernels_fit_a_convolution(drawn):
    kernel, groups = drawn
    image = torch.zeros(1, kernel.shape[1] * groups, 5, dtype=kernel.dtype)
    assert nn.functional.conv1d(image, kernel, groups=groups).shape[1] == kernel.shape[0]


@settings(max_examples=80)
@given(drawn=layers())
def test_layers_have_the_bound_that_is_proved(drawn):
    layer, shape = drawn
    assert_lipschitz(layer, shape, lipschitz_bound(layer, shape).bound, rtol=1e-12)
