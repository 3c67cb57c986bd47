"""Which orthogonal matrix: polar types give the nearest, Gram–Schmidt types the triangular factor's partner."""

import pytest
import torch

from orthogonium.linalg import condition_number
from tests.helpers import (
    DTYPES,
    GRAM_SCHMIDT_TYPE,
    POLAR_TYPE,
    SHAPES,
    STARTS,
    constraint,
    gram_schmidt_reference,
    polar_reference,
)

FULL_RANK = [
    "gaussian",
    "orthogonal",
    "near_orthogonal",
    "condition_100",
    "condition_worst",
    "tiny",
    "huge",
    "subnormal",
]


def distance(weight, reference):
    return torch.linalg.matrix_norm(weight.double() - reference, ord=2)


def sensitivity(matrix):
    """``√n eps κ``: how far a change of the last bit moves it (Higham, *Functions of Matrices*, section 8.2)."""
    return min(matrix.shape[-2:]) ** 0.5 * torch.finfo(matrix.dtype).eps * condition_number(matrix)


@pytest.mark.parametrize("start", FULL_RANK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", POLAR_TYPE)
def test_polar_types_give_the_nearest(preset, dtype, start):
    for shape in SHAPES:
        free = STARTS[start](shape, dtype)
        error = distance(constraint(preset, shape, dtype)(free), polar_reference(free))
        ratio = (error / sensitivity(free)).max().item()
        assert ratio <= 4, f"{shape}: {ratio:.1f} √n eps κ from the polar factor"


@pytest.mark.parametrize("start", FULL_RANK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", GRAM_SCHMIDT_TYPE)
def test_gram_schmidt_types_give_the_triangular_partner(preset, dtype, start):
    for shape in SHAPES:
        free = STARTS[start](shape, dtype)
        error = distance(constraint(preset, shape, dtype)(free), gram_schmidt_reference(free))
        ratio = (error / sensitivity(free)).max().item()
        assert ratio <= 4, f"{shape}: {ratio:.1f} √n eps κ from the Gram–Schmidt factor"
