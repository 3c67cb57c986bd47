"""Changing the dtype, half precision, and autocast."""

import pytest
import torch

from orthogonium.layers import OrthoLinear
from orthogonium.linalg import orthogonality_defect
from orthogonium.reparametrizers import PRESETS
from tests.helpers import EXACT_GRADIENT, SKEW_TYPE, constraint, contract, gaussian, orthogonal_matrix

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_to_double(preset, training):
    layer = OrthoLinear(6, 4, ortho_params=PRESETS[preset]).train(training)
    before = layer.weight.detach().clone()
    layer.double()
    assert layer.weight.dtype == torch.float64
    assert orthogonality_defect(layer.weight) <= contract(layer.weight)
    assert (layer.weight - before).abs().max() <= contract(before)
    assert orthogonality_defect(layer.float().weight) <= contract(before)
    layer(torch.ones(6)).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_float32_rounded_once(preset, half):
    for shape in [(1, 1), (8, 8), (2, 3, 7), (64, 16)]:
        free = gaussian(shape, dtype=half).requires_grad_()
        made = constraint(preset, shape, half)
        weight = made(free)
        assert weight.dtype == half
        wide = constraint(preset, shape, torch.float32)(free.detach().float())
        assert torch.equal(weight, wide.to(half))
        weight.sum().backward()
        assert free.grad.dtype == half
        assert free.grad.isfinite().all()


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_in_half_precision(preset, half):
    layer = OrthoLinear(16, 8, ortho_params=PRESETS[preset])
    before = layer.weight.detach().clone()
    layer.to(half)
    assert layer.weight.dtype == half
    eps = torch.finfo(half).eps
    assert (layer.weight.float() - before).abs().max() <= 4 * eps  # free tensor or base, and weight, rounded once each
    assert orthogonality_defect(layer.weight) <= 8 * 8**0.5 * eps
    y = layer(torch.ones(3, 16, dtype=half))
    y.sum().backward()
    assert y.dtype == half
    target = orthogonal_matrix((8, 16)).to(half)
    layer.weight = target
    assert (layer.weight.float() - target.float()).abs().max() <= 4 * eps
    again = OrthoLinear(16, 8, ortho_params=PRESETS[preset], dtype=half)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_stays_outside(preset, training):
    """The orthogonalisation gives the bits of full precision; only the product with the input is rounded."""
    shape, direction = (32, 16), gaussian((32, 16), dtype=torch.float32, seed=1)
    free = [gaussian(shape, dtype=torch.float32).requires_grad_() for _ in range(2)]
    made = [constraint(preset, shape, torch.float32).train(training) for _ in range(2)]
    plain = made[0](free[0])
    (plain * direction).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made[1](free[1])
        (cast * direction).sum().backward()  # inside autocast as well, which users should not do and do
    assert torch.equal(cast, plain)
    assert torch.equal(free[1].grad, free[0].grad)
    layer = OrthoLinear(16, 32, ortho_params=PRESETS[preset]).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(16)).dtype == torch.bfloat16
        assert orthogonality_defect(layer.weight) <= contract(layer.weight)


@pytest.mark.parametrize("preset", EXACT_GRADIENT)
def test_gradient_penalty_under_autocast(preset):
    """A gradient taken with ``create_graph=True`` inside autocast, differentiated outside, as torch advises."""
    for shape in [(4, 3), (4, 4)]:
        direction, results = gaussian(shape, dtype=torch.float32, seed=1), []
        for enabled in (False, True):
            free = gaussian(shape, dtype=torch.float32).requires_grad_()
            made = constraint(preset, shape, torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                (first,) = torch.autograd.grad((made(free) * direction).sum(), free, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), free)
            results.append((first, second))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_other_numbers_are_refused(preset, dtype):
    with pytest.raises(TypeError, match="floating-point tensor, got"):
        constraint(preset, (2, 2))(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match="floating"):
        OrthoLinear(2, 2, ortho_params=PRESETS[preset], dtype=dtype)


@pytest.mark.parametrize("preset", SKEW_TYPE)
def test_base_frame_keeps_its_precision(preset):
    """A base rounded to half precision is made orthogonal again, to the precision that comes next."""
    layer = OrthoLinear(16, 16, ortho_params=PRESETS[preset])
    layer.bfloat16().float()
    assert orthogonality_defect(layer.weight) <= contract(layer.weight)
    layer.bfloat16().double()
    assert orthogonality_defect(layer.weight) <= contract(layer.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_gpu(preset, dtype):
    free = gaussian((2, 5, 3), dtype=dtype)
    expected = constraint(preset, free.shape, dtype)(free)
    made = constraint(preset, free.shape, dtype).cuda()
    moved = free.cuda().requires_grad_()
    weight = made(moved)
    weight.square().sum().backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.cpu(), expected, rtol=0, atol=100 * eps)
    assert moved.grad.isfinite().all()
