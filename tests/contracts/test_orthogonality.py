"""Every preset gives an orthogonal matrix with a finite gradient, from every finite start."""

import pytest
import torch

from orthogonium.linalg import NonFiniteError, orthogonality_defect
from orthogonium.reparametrizers import PRESETS
from tests.helpers import DTYPES, SHAPES, STARTS, constraint, contract, gaussian


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_orthogonal_with_finite_gradients(preset, dtype, start):
    for shape in SHAPES:
        free = STARTS[start](shape, dtype).requires_grad_()
        weight = constraint(preset, shape, dtype, base_seed=7)(free)
        assert weight.shape == shape
        assert weight.dtype == dtype
        defect = orthogonality_defect(weight.detach()).max().item()
        assert defect <= contract(weight), f"{shape}: defect {defect:.1e}, promised {contract(weight):.1e}"
        (gradient,) = torch.autograd.grad(weight, free, gaussian(shape, dtype=dtype, seed=8))
        assert gradient.isfinite().all(), f"{shape}: gradient holds NaN or Inf"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_completion_is_deterministic(preset, dtype):
    for start in ("zero", "rank_one", "rank_deficient"):
        free = STARTS[start]((2, 5, 3), dtype)
        first, second = (constraint(preset, free.shape, dtype)(free.clone()) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("preset", PRESETS)
def test_zero_becomes_the_identity(preset):
    for shape in [(3, 3), (2, 3, 5), (5, 3)]:
        weight = constraint(preset, shape)(torch.zeros(shape, dtype=torch.float64))
        assert torch.equal(weight, torch.eye(*shape[-2:], dtype=torch.float64).expand(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
def test_not_a_number_is_an_error_that_names_the_tensor(preset, training, bad):
    for shape in [(1, 1), (4, 4), (2, 3, 5), (6, 4)]:
        free = gaussian(shape)
        free[..., 0, 0] = bad
        made = constraint(preset, shape).train(training)
        made.label = "OrthoLinear.weight"
        with pytest.raises(NonFiniteError, match=r"OrthoLinear\.weight of shape .* holds NaN or Inf in \d+ of"):
            made(free)


@pytest.mark.parametrize("preset", PRESETS)
def test_empty(preset):
    for shape in [(0, 3), (3, 0), (0, 0), (0, 3, 3), (2, 0, 3)]:
        free = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        weight = constraint(preset, shape)(free)
        assert weight.shape == shape
        weight.sum().backward()
        assert free.grad.shape == shape


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_layout_does_not_matter(preset):
    made = constraint(preset, (2, 5, 3), base_seed=1)
    free = gaussian((2, 5, 3))
    layouts = [free, free.mT.contiguous().mT, free.repeat(1, 2, 2)[:, :5, :3], free.flip(0).flip(0)]
    for layout in layouts[1:]:
        torch.testing.assert_close(made(layout), made(layouts[0].clone()), rtol=0, atol=1e-14)
