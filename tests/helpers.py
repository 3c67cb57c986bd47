"""What many tests share: tolerances that come from dtype and size, and matrices to start from."""

import torch
from torch import Tensor

from orthogonium.linalg import polar_by_svd
from orthogonium.parametrizations import Constraint
from orthogonium.reparametrizers import PRESETS

DTYPES = [torch.float32, torch.float64]
SHAPES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (4, 4),
    (3, 7),
    (7, 3),
    (2, 5, 3),
    (2, 3, 4, 4),
    (3, 4, 16),
    (64, 64),
    (256, 64),
]
POLAR_TYPE = ["default", "default_test", "bjorck_pass_through", "svd", "polar"]
GRAM_SCHMIDT_TYPE = ["cholesky", "cholesky_stable", "qr"]
SKEW_TYPE = ["exp", "cayley"]
EXACT_GRADIENT = [name for name in PRESETS if name != "bjorck_pass_through"]


def rounding(tensor: Tensor) -> float:
    """What rounding alone can explain: ten units in the last place per summed term."""
    return 10 * max(tensor.shape[-2:]) * torch.finfo(tensor.dtype).eps


def contract(matrix: Tensor) -> float:
    """The orthogonality defect that every method promises: ``8 √n eps`` for the shorter side ``n``."""
    return 8 * min(matrix.shape[-2:]) ** 0.5 * torch.finfo(matrix.dtype).eps


def gaussian(shape, *, dtype=torch.float64, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_singular_values(shape, values: Tensor, *, dtype, seed) -> Tensor:
    """Random singular vectors and the given ``min(m, n)`` singular values."""
    u, _, vh = torch.linalg.svd(gaussian(shape, seed=seed), full_matrices=False)
    return ((u * values) @ vh).to(dtype)


def random_matrix(shape, *, singular_values, dtype, seed) -> Tensor:
    """A matrix whose singular values are spread evenly over the given interval."""
    values = torch.linspace(*singular_values, min(shape[-2:]), dtype=torch.float64)
    return with_singular_values(shape, values, dtype=dtype, seed=seed)


def conditioned(shape, condition: float, *, dtype, seed=0) -> Tensor:
    """A matrix of that condition number, its singular values evenly spread on a logarithmic scale."""
    exponents = torch.linspace(0, 1, min(shape[-2:]), dtype=torch.float64)
    return with_singular_values(shape, condition**-exponents, dtype=dtype, seed=seed)


def dense_exponential(matrix) -> Tensor:
    """``exp(A)`` in float64, for norms up to 64, by 24 terms of its series and six squarings.

    ``torch.matrix_exp`` is off by 6e-12 for norms about 0.025.
    """
    matrix = matrix.double() / 2**6
    result = term = torch.eye(matrix.shape[-1], dtype=torch.float64).expand(matrix.shape)
    for degree in range(1, 25):
        term = term @ matrix / degree
        result = result + term
    for _ in range(6):
        result = result @ result
    return result


def orthogonal_matrix(shape, *, dtype=torch.float64, seed=0) -> Tensor:
    return polar_by_svd(gaussian(shape, seed=seed)).to(dtype)


def _rank_deficient(shape, dtype):
    matrix = gaussian(shape, dtype=dtype, seed=3)
    if shape[-2] <= shape[-1]:
        matrix[..., -1, :] = matrix[..., 0, :] if shape[-2] > 1 else 0.0
    else:
        matrix[..., :, -1] = matrix[..., :, 0] if shape[-1] > 1 else 0.0
    return matrix


def _rank_one(shape, dtype):
    row, column = torch.arange(1, shape[-1] + 1, dtype=dtype), torch.arange(1, shape[-2] + 1, dtype=dtype)
    return torch.outer(column, row).expand(shape).clone()


def _mixed(shape, dtype):
    """In a batch, members of every kind side by side; alone, an ordinary matrix with a zero row."""
    matrix = gaussian(shape, dtype=dtype, seed=5)
    if len(shape) > 2:
        matrix[0] = 0.0
        matrix[-1] *= 1e-20
    else:
        matrix[0] = 0.0
    return matrix


SUBNORMAL = {torch.float32: 1e-40, torch.float64: 1e-310}
WORST_CONDITION = {torch.float32: 1e6, torch.float64: 1e12}

STARTS = {
    "gaussian": lambda shape, dtype: gaussian(shape, dtype=dtype, seed=1),
    "orthogonal": lambda shape, dtype: orthogonal_matrix(shape, dtype=dtype, seed=2),
    "near_orthogonal": lambda shape, dtype: (orthogonal_matrix(shape, seed=2) + 1e-3 * gaussian(shape, seed=3)).to(
        dtype
    ),
    "condition_100": lambda shape, dtype: conditioned(shape, 1e2, dtype=dtype),
    "condition_worst": lambda shape, dtype: conditioned(shape, WORST_CONDITION[dtype], dtype=dtype),
    "rank_deficient": _rank_deficient,
    "rank_one": _rank_one,
    "zero": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "tiny": lambda shape, dtype: 1e-30 * gaussian(shape, dtype=dtype, seed=4),
    "huge": lambda shape, dtype: 1e30 * gaussian(shape, dtype=dtype, seed=4),
    "subnormal": lambda shape, dtype: (SUBNORMAL[dtype] * gaussian(shape, seed=4)).to(dtype),
    "mixed": _mixed,
}


def constraint(name: str, shape, dtype=torch.float64, *, base_seed: int | None = None) -> Constraint:
    """The pipeline of a preset. ``base_seed`` gives the skew methods a base frame other than the identity."""
    made = Constraint(*PRESETS[name].make(shape)).to(dtype)
    if base_seed is not None and name in SKEW_TYPE:
        made.right_inverse(orthogonal_matrix(shape, dtype=dtype, seed=base_seed))
    return made


def _in_float64(matrix: Tensor) -> Tensor:
    """The same matrix up to an exact power of two that keeps LAPACK away from subnormal numbers."""
    matrix = matrix.double()
    return matrix * 2.0**500 if matrix.abs().max() < 2.0**-500 else matrix


def polar_reference(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(_in_float64(matrix), full_matrices=False)
    return u @ vh


def gram_schmidt_reference(matrix: Tensor) -> Tensor:
    """Orthonormalised rows (columns, if tall) in order, each with a positive share of its own row, in float64."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        return _columns_orthonormalized(matrix.mT).mT
    return _columns_orthonormalized(matrix)


def _columns_orthonormalized(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(_in_float64(matrix))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * signs[..., None, :]
