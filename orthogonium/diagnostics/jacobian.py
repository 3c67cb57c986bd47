"""The largest and smallest stretch of a function at a point, without writing its Jacobian out."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class JacobianExtremes:
    """``largest`` and ``smallest`` of the ``min(inputs, outputs)`` singular values.

    ``exact``: from the written-out Jacobian, up to rounding. Otherwise ``largest`` errs low (by little), and
    ``smallest`` is only an upper bound: there may be directions that are squeezed more.
    """

    largest: float
    smallest: float
    exact: bool


def jacobian_extremes(
    function: Callable[[Tensor], Tensor], point: Tensor, steps: int = 30, dense: int = 256
) -> JacobianExtremes:
    """Extreme singular values of the Jacobian of ``function`` at ``point``.

    Up to ``dense`` inputs or outputs the Jacobian is written out. Beyond that, Golub–Kahan–Lanczos bidiagonalisation
    with full reorthogonalisation takes ``steps`` products with the Jacobian and its transpose. Both come from one
    forward pass: the transpose by a backward pass ``u ↦ Jᵀu``, the Jacobian itself by differentiating that linear map
    once more, so whatever has a second derivative works.

    Args:
        function: a tensor to a tensor, any shapes.
        point: real floating point.
        steps: of the iteration.
        dense: largest shorter side that is written out.

    Raises:
        ValueError: ``steps`` below one, or an empty input or output.

    Source:
        Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", SIAM J. Numer. Anal. 2(2),
        1965.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        x = point.detach().clone().requires_grad_()
        y = function(x * 1)  # in-place operations may not touch a leaf
        if x.numel() == 0 or y.numel() == 0:
            raise ValueError(f"function must map numbers to numbers, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if not y.requires_grad:
            return JacobianExtremes(0.0, 0.0, True)
        cotangent = torch.zeros_like(y).requires_grad_()
        short = min(x.numel(), y.numel())
        if short <= dense and y.numel() <= x.numel():
            matrix = _rows(y, x)
        else:
            (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            if not pulled.requires_grad:
                return JacobianExtremes(0.0, 0.0, True)
            if short > dense:
                return _lanczos(y, x, pulled, cotangent, min(steps, short), short)
            matrix = _rows(pulled, cotangent)
    if not bool(torch.isfinite(matrix).all()):
        return JacobianExtremes(nan, nan, True)
    values = torch.linalg.svdvals(matrix.double())
    return JacobianExtremes(float(values[0]), float(values[-1]), True)


def _rows(output: Tensor, given: Tensor) -> Tensor:
    """The Jacobian of ``output`` to ``given``, ``(outputs, inputs)``, by one backward pass per row."""
    found = torch.zeros(output.numel(), given.numel(), dtype=output.dtype, device=output.device)
    for row in range(output.numel()):
        unit = torch.zeros_like(output)
        unit.view(-1)[row] = 1
        (gradient,) = torch.autograd.grad(output, given, unit, retain_graph=True, allow_unused=True)
        if gradient is not None:
            found[row] = gradient.reshape(-1)
    return found


def _lanczos(y: Tensor, x: Tensor, pulled: Tensor, cotangent: Tensor, steps: int, short: int) -> JacobianExtremes:
    def product(v: Tensor) -> Tensor:
        tangent = v.to(x.dtype).view_as(x)
        (found,) = torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True)
        return found.detach().reshape(-1).double()

    def transposed_product(u: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(y, x, u.to(y.dtype).view_as(y), retain_graph=True)
        return found.detach().reshape(-1).double()

    apply: Callable[[Tensor], Tensor] = product
    transpose: Callable[[Tensor], Tensor] = transposed_product
    if y.numel() < x.numel():  # starting on the shorter side keeps the least value a bound
        apply, transpose = transposed_product, product
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(short, generator=generator, dtype=torch.float64).to(x.device)
    right, left = [v / v.norm()], list[Tensor]()
    diagonal: list[Tensor] = []
    above: list[Tensor] = []
    for step in range(steps):
        u = apply(right[-1])
        if left:
            u = u - above[-1] * left[-1]
        u = _orthogonalized(u, left)
        diagonal.append(u.norm())
        if not isfinite(float(diagonal[-1])):
            return JacobianExtremes(nan, nan, False)
        if float(diagonal[-1]) <= 1e-12 * float(max(diagonal)):
            break
        left.append(u / diagonal[-1])
        v = _orthogonalized(transpose(left[-1]) - diagonal[-1] * right[-1], right)
        size = v.norm()
        if step == steps - 1 or float(size) <= 1e-12 * float(max(diagonal)):
            break
        above.append(size)
        right.append(v / size)
    bidiagonal = torch.diag(torch.stack(diagonal))
    if above:
        bidiagonal += torch.diag(torch.stack(above)[: len(diagonal) - 1], 1)
    values = torch.linalg.svdvals(bidiagonal)
    return JacobianExtremes(float(values[0]), float(values[-1]), len(diagonal) == short)


def _orthogonalized(vector: Tensor, basis: list[Tensor]) -> Tensor:
    if not basis:
        return vector
    matrix = torch.stack(basis)
    for _ in range(2):  # twice is enough
        vector = vector - matrix.T @ (matrix @ vector)
    return vector
