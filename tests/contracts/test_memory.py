"""What autograd keeps between forward and backward pass, in units of the weight: none of it grows with iterations."""

import pytest
import torch

from orthogonium.parametrizations import BatchedBjorckOrthogonalization
from orthogonium.reparametrizers import PRESETS
from tests.helpers import conditioned, gaussian


def saved(hook, free) -> float:
    """Bytes of the storages saved, each counted once, without free tensor and weight, over those of the weight."""
    storages, holding = {}, []

    def pack(tensor):
        holding.append(tensor)
        if tensor.numel() <= 2:  # the note on which road was taken: sixteen bytes whatever the size
            return tensor
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weight = hook(free)
    for known in (free, weight):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / (free.numel() * free.element_size())


def hook_and_free(preset, shape, condition):
    _, hook = PRESETS[preset].make(shape)
    return hook, conditioned(shape, condition, dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize("condition", [1.05, 3.0, 100.0, 1e5], ids=str)
@pytest.mark.parametrize("preset", ["default", "default_test", "polar", "svd"])
def test_polar(preset, condition):
    assert saved(*hook_and_free(preset, (64, 64), condition)) <= 2.0
    assert saved(*hook_and_free(preset, (32, 128), condition)) <= 1.3
    assert saved(*hook_and_free(preset, (128, 32), condition)) <= 1.3


@pytest.mark.parametrize("preset", ["default", "polar"])
def test_polar_near_orthogonal(preset):
    for shape in [(64, 64), (32, 128), (128, 32)]:
        assert saved(*hook_and_free(preset, shape, 1.05)) <= 0.26  # H⁻¹ is a quarter at 1:4, and three small tensors


def test_iterations_cost_no_memory():
    free = gaussian((32, 32), dtype=torch.float32).requires_grad_()
    few, many = (saved(BatchedBjorckOrthogonalization((32, 32), niters=niters), free) for niters in (1, 50))
    assert few == many


def test_pass_through_stores_nothing():
    for shape in [(64, 64), (32, 128), (128, 32)]:
        assert saved(*hook_and_free("bjorck_pass_through", shape, 3.0)) <= 0.01


@pytest.mark.parametrize("preset", ["cholesky", "cholesky_stable", "qr"])
def test_gram_schmidt_stores_the_triangular_factor(preset):
    assert saved(*hook_and_free(preset, (64, 64), 3.0)) <= 1.01
    assert saved(*hook_and_free(preset, (32, 128), 3.0)) <= 0.26
    assert saved(*hook_and_free(preset, (128, 32), 3.0)) <= 0.26


def test_exponential_and_cayley():
    for preset, bound in [("exp", 1.01), ("cayley", 2.01)]:  # the base frame, and Cayley's inverse
        assert saved(*hook_and_free(preset, (64, 64), 3.0)) <= bound
