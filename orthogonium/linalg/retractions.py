"""Steps on the orthogonal matrices: from a point and a direction back to the manifold.

A *point* has orthonormal rows or columns, whichever are fewer (a Stiefel manifold; the orthogonal group when square).
Written below for columns, ``QᵀQ = I``; wide points are transposed.
"""

import torch
from torch import Tensor

from orthogonium._checks import check_floating, check_matrix
from orthogonium.linalg._exponential_steps import expm, squarings_for
from orthogonium.linalg._figures import frobenius, largest, trace
from orthogonium.linalg._precision import differentiates_forward, raise_if_not_finite, without_autocast
from orthogonium.linalg._products import newton_schulz
from orthogonium.linalg.exponential import Map, skew_frame
from orthogonium.linalg.polar import polar
from orthogonium.linalg.small_step import polar_after_step

# Beyond these a rectangular point is projected densely: amplification of rounding, and condition number (in float64,
# where there is no wider type for the small matrices).
_LARGEST = 64.0
_WORST_CONDITION = 16.0

_FARTHEST = 2.0**64  # norm of a generator beyond which its exponential has no correct digit in any case


def tangent_projection(point: Tensor, direction: Tensor) -> Tensor:
    """The part of ``direction`` along the manifold: ``D − Q sym(Qᵀ D)``, nearest to ``D`` in the Frobenius norm.

    Args:
        point: ``(..., m, n)``, orthogonal.
        direction: ``(..., m, n)``, such as a gradient.

    Returns:
        ``(..., m, n)``, like ``direction``.

    Raises:
        ValueError: shapes that differ or are no matrices.
        TypeError: not real floating point.

    Source: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix Anal.
    Appl. 20(2), 1998, section 2.2.
    """
    _check_pair("direction", point, direction)
    with without_autocast(point):
        base, step = _working(point), _working(direction)
        if base.shape[-2] < base.shape[-1]:
            cross = step @ base.mT
            return (step - 0.5 * (cross + cross.mT) @ base).to(direction.dtype)
        cross = base.mT @ step
        return (step - 0.5 * base @ (cross + cross.mT)).to(direction.dtype)


def polar_retraction(point: Tensor, step: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``Q + S``: any step, not only a tangent one; second order for those.

    Args:
        point: ``(..., m, n)``, orthogonal.
        step: ``(..., m, n)``.

    Returns:
        ``(..., m, n)``, orthogonal to rounding whatever came before: this retraction never drifts.

    Raises:
        ValueError: shapes that differ or are no matrices; NaN or Inf.
        TypeError: not real floating point.

    Source: Absil and Malick, "Projection-like retractions on matrix manifolds", SIAM J. Optim. 22(1), 2012.
    """
    _check_pair("step", point, step)
    moved = _working(point) + _working(step)
    differentiates = moved.requires_grad or differentiates_forward()
    return (polar if differentiates else polar_after_step)(moved).to(point.dtype)


def cayley_retraction(point: Tensor, step: Tensor) -> Tensor:
    """``(I − A/2)⁻¹ (I + A/2) Q`` with the skew ``A`` of the tangent part of ``step``: ``A Q`` is that part.

    A rational map instead of a projection: the determinant cannot change, and a step of any size turns by less than π.

    Args, Raises: as :func:`polar_retraction`.

    Returns:
        ``(..., m, n)``, as orthogonal as ``point``, up to rounding.

    Source: Wen and Yin, "A feasible method for optimization with orthogonality constraints", Math. Program. 142, 2013.
    """
    return _turned(point, step, "cayley")


def geodesic_retraction(point: Tensor, step: Tensor) -> Tensor:
    """``exp(A) Q`` with the skew ``A`` of the tangent part of ``step``: the geodesic of the canonical metric.

    Args, Raises: as :func:`polar_retraction`.

    Returns:
        ``(..., m, n)``, as orthogonal as ``point``, up to rounding.

    Source: Edelman, Arias and Smith, SIAM J. Matrix Anal. Appl. 20(2), 1998, section 2.4.
    """
    return _turned(point, step, "exponential")


def _turned(point: Tensor, step: Tensor, kind: Map) -> Tensor:
    _check_pair("step", point, step)
    base, change = _working(point), tangent_projection(_working(point), _working(step))
    if base.shape[-2] < base.shape[-1]:
        return _turned(point.mT, step.mT, kind).mT
    with without_autocast(point):
        cross = base.mT @ change  # skew
        # A = X Qᵀ − Q Xᵀ gives A Q = S for X = S − Q (QᵀS) / 2; a square frame is given in its own coordinates
        free = 0.5 * cross if base.shape[-2] == base.shape[-1] else change - 0.5 * base @ cross
        return skew_frame(free, base, kind).to(point.dtype)


def low_rank_polar_update(point: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``W + a bᵀ``, exactly, in ``O(m n k)``.

    ``W + a bᵀ`` moves ``W`` within ``span[b, Wᵀa]`` alone. With ``V`` an orthonormal basis of it and ``N = Vᵀ Wᵀ a bᵀ
    V``, a square point becomes

        W + (W V) (polar(I + N) − I) Vᵀ :

    ``W`` times a matrix that is orthogonal by construction, so that errors add up and are never multiplied. (The
    equivalent ``(W + a bᵀ) (I + ...)^(−½)`` multiplies them, and diverges.) A tall point has one more term, from the
    part of ``a`` outside its column space. What is ``2k`` wide is computed in float64. Where a step is so large that
    this would lose digits, the dense :func:`~orthogonium.linalg.polar.polar` takes over.

    Args:
        point: ``W``, ``(..., m, n)``, orthogonal.
        left: ``a``, ``(..., m, k)``.
        right: ``b``, ``(..., n, k)``.

    Returns:
        ``(..., m, n)``. As orthogonal as ``point`` up to rounding, which adds up over thousands of steps: project from
        time to time.

    Raises:
        ValueError: shapes that do not match; NaN or Inf in ``left`` or ``right``.
        TypeError: not real floating point.

    Source: Kiani, Balestriero, LeCun and Lloyd, "projUNN: efficient method for training deep networks with unitary
    matrices", NeurIPS 2022, for the idea and the cost; the form above and the rectangular case are our own.
    """
    _check_factors(point, left, right)
    with without_autocast(point):
        base = _working(point)
        factors = polar_factors(base, _working(left), _working(right))
        if factors is None:
            return polar(base + _working(left) @ _working(right).mT).to(point.dtype)
        return (base + factors[0] @ factors[1].mT).to(point.dtype)


def low_rank_geodesic_update(point: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """From ``W`` along the geodesic whose direction is the tangent part of ``a bᵀ``, in ``O(m n k)``.

    For a square ``W`` that is ``W exp(skew(Wᵀ a bᵀ))``, with the exponential of a ``2k × 2k`` matrix alone. For
    rectangular ones the canonical metric is meant. The determinant cannot change. Digits are lost in proportion to the
    angle: meant for steps of a turn or less.

    Args, Returns, Raises: as :func:`low_rank_polar_update`.

    Source: Kiani, Balestriero, LeCun and Lloyd, NeurIPS 2022 (square points); Edelman, Arias and Smith, 1998.
    """
    _check_factors(point, left, right)
    with without_autocast(point):
        base = _working(point)
        step, side = geodesic_factors(base, _working(left), _working(right))
        return (base + step @ side.mT).to(point.dtype)


def polar_factors(point: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(x, y)`` with ``W + x yᵀ`` the polar factor of ``W + a bᵀ``; ``None`` where only a dense one is accurate."""
    if point.shape[-2] < point.shape[-1]:
        found = polar_factors(point.mT, right, left)
        return None if found is None else found[::-1]
    basis, turned, inner, side, outside = _subspace(point, left, right)
    inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
    if outside is None:
        u, _, vh = torch.linalg.svd(inner)
        return _moved(turned, newton_schulz(u @ vh)), basis
    triangle = torch.linalg.qr(outside.double(), mode="r").R
    u, values, vh = torch.linalg.svd(torch.cat((inner, triangle @ side), -2), full_matrices=False)
    inverse = (vh.mT / values[..., None, :].clamp_min(torch.finfo(torch.float64).tiny)) @ vh
    weights = side @ inverse
    # what rounding left of W in `outside` is multiplied by these weights, which are good to the condition number
    amplified = torch.linalg.matrix_norm(left.double()) * torch.linalg.matrix_norm(weights)
    condition = values[..., 0] / values[..., -1] * (torch.finfo(torch.float64).eps / torch.finfo(point.dtype).eps)
    if not bool(((amplified <= _LARGEST) & (condition <= _WORST_CONDITION)).all()):
        return None
    rotation = u[..., : inner.shape[-1], :] @ vh
    return _moved(turned, rotation) + outside @ weights.to(point.dtype), basis


def geodesic_factors(point: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``(x, y)`` with ``W + x yᵀ`` the end of the geodesic."""
    if point.shape[-2] < point.shape[-1]:
        return geodesic_factors(point.mT, right, left)[::-1]
    basis, turned, inner, side, outside = _subspace(point, left, right)
    skew = 0.5 * (inner - inner.mT)
    if outside is None:
        return _moved(turned, newton_schulz(_exponential(skew))), basis
    # in the coordinates [W V, a⊥/α] the turn is exp [[K, −BᵀZ/α], [α B, 0]] with B = bᵀV and Z = a⊥ᵀa⊥
    gram = outside.mT.double() @ outside.double()
    size = trace(gram).sqrt()[..., None, None]
    alpha = torch.where(size > 0, size, 1.0)
    upper = torch.cat((skew, -side.mT @ gram / alpha), -1)
    turn = _exponential(torch.cat((upper, torch.cat((alpha * side, torch.zeros_like(gram)), -1)), -2))
    width = skew.shape[-1]
    columns = turn[..., :width]
    inside = _moved(turned, columns[..., :width, :])
    return inside + outside @ (columns[..., width:, :] / alpha).to(point.dtype), basis


def _exponential(matrix: Tensor) -> Tensor:
    """To rounding: ``torch.matrix_exp`` is off by 6e-12 in float64 for norms about 0.025, which steps often have."""
    if matrix.numel() == 0:
        return matrix
    return expm(matrix, squarings_for(min(largest(frobenius(matrix)), _FARTHEST), matrix.dtype))


def _subspace(point: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """``(V, W V, N, bᵀV, a⊥)``: N and bᵀV in float64, and ``None`` for the empty outside of a square point."""
    if not bool(torch.isfinite(torch.linalg.vector_norm(left) + torch.linalg.vector_norm(right))):
        raise_if_not_finite("left", left)
        raise_if_not_finite("right", right)
    cross = point.mT @ left
    basis = torch.linalg.qr(torch.cat((right, cross), -1)).Q
    side = (right.mT @ basis).double()
    inner = (basis.mT @ cross).double() @ side
    outside = None
    if point.shape[-2] > point.shape[-1]:
        outside = left - point @ cross
        outside = outside - point @ (point.mT @ outside)  # twice is enough
    return basis, point @ basis, inner, side, outside


def _moved(turned: Tensor, rotation: Tensor) -> Tensor:
    """``T P − W V`` with ``T`` the columns ``W V`` after a Newton–Schulz step.

    So whatever rounding has left in the subspace that moves is mended on the way, at no cost of size ``n²``.
    """
    wide = turned.double()
    change = rotation - 0.5 * _minus_identity(wide.mT @ wide) @ rotation
    return turned @ _minus_identity(change).to(turned.dtype)


def _minus_identity(matrix: Tensor) -> Tensor:
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return result


def _working(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_pair(name: str, point: Tensor, other: Tensor) -> None:
    check_matrix("point", point)
    check_floating("point", point)
    check_floating(name, other)
    if other.shape != point.shape:
        raise ValueError(f"{name} must have the shape of point, {tuple(point.shape)}, got {tuple(other.shape)}")


def _check_factors(point: Tensor, left: Tensor, right: Tensor) -> None:
    check_matrix("point", point)
    for name, value in (("point", point), ("left", left), ("right", right)):
        check_floating(name, value)
    *batch, m, n = point.shape
    rank = left.shape[-1] if left.ndim else 0
    for name, value, side in (("left", left, m), ("right", right, n)):
        if tuple(value.shape) != (*batch, side, rank):
            raise ValueError(
                f"{name} must have shape {(*batch, side, 'k')} with one k for both factors, got {tuple(value.shape)} "
                f"beside point {tuple(point.shape)} and left {tuple(left.shape)}"
            )
