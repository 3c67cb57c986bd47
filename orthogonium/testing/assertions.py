"""Assertions on the operator that a layer is, written out or bounded."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthogonium.certification import lipschitz_bound, plain_network

_LARGEST = 2**26  # entries of an operator that is written out


def materialise(module: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """The matrix ``(outputs, inputs)`` of an affine module without its offset, in float64, from impulses.

    The weights are read once, in evaluation mode, and converted exactly; the module itself is left alone.

    Args:
        module: affine on inputs of this shape, of what :func:`~orthogonium.lipschitz_bound` can trace.
        input_shape: of one input, without the batch.

    Raises:
        ValueError: the operator has more than 2²⁶ entries, or the module is not affine.
    """
    network = plain_network(copy.deepcopy(module).eval())
    shape = tuple(input_shape)
    size = torch.Size(shape).numel()
    with torch.no_grad():
        offset = network(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        if offset.numel() * size > _LARGEST:
            raise ValueError(
                f"an operator of {offset.numel()} × {size} entries is too large. Use a smaller input_shape"
            )
        impulses = torch.eye(size, dtype=torch.float64).view(size, *shape)
        columns = [network(part).flatten(1) - offset for part in impulses.split(256)]
        matrix = torch.cat(columns).mT if columns else offset.new_zeros(offset.numel(), 0)
        probe = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probe *= torch.tensor([0.01, 1.0, 100.0, 10_000.0]).view(-1, *(1,) * len(shape))  # kinks may lie far out
        expected = probe.flatten(1) @ matrix.mT + offset
        errors = torch.linalg.vector_norm(network(probe).flatten(1) - expected, dim=1)
        allowed = 1e-9 * (1 + torch.linalg.vector_norm(expected, dim=1))
    if not bool((errors <= allowed).all()):
        raise ValueError(
            f"{type(module).__name__} is not affine: a random input differs by {float(errors.max()):.3g} from the sum "
            f"of its impulse responses, so that it has no operator"
        )
    return matrix


def assert_lipschitz(
    module: nn.Module,
    input_shape: Sequence[int],
    bound: float = 1.0,
    *,
    rtol: float = 1e-6,
    points: int = 8,
    seed: int = 0,
) -> None:
    """Fail unless ``module`` is Lipschitz with constant ``bound``, as far as can be seen or proved.

    An affine module is written out in float64 and its largest singular value compared. Of any other, the slopes between
    random points and the norms of Jacobians there are, which can only show that a bound is wrong; where
    :func:`~orthogonium.lipschitz_bound` proves ``bound``, the test ends there.

    Args:
        module: maps ``(N, *input_shape)`` to ``(N, ...)``; tested in evaluation mode, on a copy.
        input_shape: of one input, without the batch.
        bound: the constant that is promised.
        rtol: relative excess to let pass, for the rounding of the weights.
        points: random inputs for modules that are not affine, of norms over several decades.
        seed: of these.

    Raises:
        AssertionError: the constant is exceeded; the message names the largest singular value or slope.
    """
    name = type(module).__name__
    network = plain_network(copy.deepcopy(module).eval())
    limit = bound * (1 + rtol)
    shape = tuple(input_shape)
    try:
        matrix = materialise(module, shape)
    except ValueError as error:
        if "not affine" not in str(error):
            raise
    else:
        sigma = float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0
        assert sigma <= limit, (
            f"{name} on inputs of shape {shape} has σ_max = {sigma:.9g}, above the promised {bound:.9g} "
            f"(operator of {matrix.shape[0]} × {matrix.shape[1]} in float64)"
        )
        return
    if _proved(module, shape) <= limit:
        return
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, points, dtype=torch.float64).view(-1, *(1,) * len(shape))
    x = torch.randn(points, *shape, generator=generator, dtype=torch.float64) * scales
    for number, point in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda p: network(p[None]).flatten(), point)
        slope = float(torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2))
        assert slope <= limit, (
            f"{name} on inputs of shape {shape} has a Jacobian with σ_max = {slope:.9g} at random point {number}, "
            f"above the promised {bound:.9g}"
        )
    near = x + 1e-3 * scales * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for other in (x.roll(1, 0), near):
        with torch.no_grad():
            apart = (network(x) - network(other)).flatten(1).norm(dim=1)
        slope = float((apart / (x - other).flatten(1).norm(dim=1).clamp_min(1e-300)).max())
        assert slope <= limit, (
            f"{name} on inputs of shape {shape} grows a distance by {slope:.9g}, above the promised {bound:.9g}"
        )


def _proved(module: nn.Module, shape: tuple[int, ...]) -> float:
    try:
        return lipschitz_bound(copy.deepcopy(module).eval(), shape).bound
    except TypeError:  # no rule: only slopes are left
        return float("inf")


def assert_orthogonal(
    module_or_matrix: nn.Module | Tensor, input_shape: Sequence[int] | None = None, *, atol: float | None = None
) -> None:
    """Fail unless all singular values are one: orthonormal rows or columns, whichever are fewer.

    Args:
        module_or_matrix: an affine module, which is written out in float64; or a matrix or batch of them.
        input_shape: of one input to the module, without the batch.
        atol: how far a singular value may be from one; by default ``8 √n ε`` with n the shorter side for a matrix and
            the longer one for an operator, and ε of the dtype of the matrix or of the module's parameters.

    Raises:
        AssertionError: a singular value is further from one; the message names the smallest and the largest.
        ValueError: a module without ``input_shape``, a tensor of fewer than two dimensions, or a module that is not
            affine.
    """
    if isinstance(module_or_matrix, Tensor):
        matrix, dtype, side = module_or_matrix.detach().double(), module_or_matrix.dtype, min
        name = f"the matrix of shape {tuple(matrix.shape)}"
        assert bool(torch.isfinite(matrix).all()), f"{name} is not orthogonal: it holds NaN or Inf"
        if matrix.ndim < 2:
            raise ValueError(f"a matrix must have shape (..., m, n), got {tuple(matrix.shape)}")
    else:
        if input_shape is None:
            raise ValueError("input_shape is needed to write out the operator of a module, e.g. (3, 8, 8)")
        matrix, side = materialise(module_or_matrix, input_shape), max
        dtype = next((p.dtype for p in module_or_matrix.parameters() if p.is_floating_point()), torch.float64)
        name = f"{type(module_or_matrix).__name__} on inputs of shape {tuple(input_shape)}"
    allowed = 8 * side(matrix.shape[-2:]) ** 0.5 * torch.finfo(dtype).eps if atol is None else atol
    values = torch.linalg.svdvals(matrix)
    if values.numel() == 0:
        return
    smallest, largest = float(values.min()), float(values.max())
    assert max(abs(largest - 1), abs(smallest - 1)) <= allowed, (
        f"{name} is not orthogonal: σ_max = {largest:.9g}, σ_min = {smallest:.9g}, further from one than {allowed:.2g}"
    )
