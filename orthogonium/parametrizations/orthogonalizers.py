"""From a free matrix to an orthogonal one: the ``Batched*Orthogonalization`` hooks, thin over ``orthogonium.linalg``.

All of them return a matrix with orthonormal rows or columns, whichever are fewer, to rounding and from every finite
input. *Polar-type* ones (Björck, polar, SVD) return the nearest such matrix, *Gram–Schmidt* ones (Cholesky, QR) the
triangular factor's partner, *skew* ones (exponential, Cayley) turn a base frame. ``scale_invariant`` ones need no
normaliser.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orthogonium._checks import check_floating, check_same_shape, check_weight_shape
from orthogonium.linalg import (
    cholesky_orthogonalize,
    in_working_precision,
    orthogonality_defect,
    polar,
    polar_by_svd,
    polar_pass_through,
    qr_orthogonalize,
    skew_frame,
)
from orthogonium.linalg._gram_schmidt import gram_schmidt_with_pullback
from orthogonium.linalg._polar_record import SVD_ONLY
from orthogonium.linalg._pullback import Pullback
from orthogonium.linalg.bjorck import polar_pass_through_with_pullback
from orthogonium.linalg.exponential import skew_frame_with_pullback
from orthogonium.linalg.polar import polar_with_pullback
from orthogonium.parametrizations._evaluation import ComputeWithReverse, Reverse
from orthogonium.parametrizations.closed_form import overrides


class Orthogonalization(nn.Module):
    """What the hooks share.

    Args:
        weight_shape: ``(..., m, n)``; the leading sides are a batch of matrices.

    Raises:
        ValueError: a shape without a matrix; later, a weight of another shape.
    """

    scale_invariant: ClassVar[bool] = True

    def __init__(self, weight_shape: Sequence[int]) -> None:
        super().__init__()
        self.weight_shape = check_weight_shape(weight_shape)

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        """:meth:`orthogonalize` and the map from a gradient to that of ``matrix``, if that is known in closed form.

        A class that overrides :meth:`orthogonalize` and not this method is differentiated by autograd.
        """
        raise NotImplementedError

    def closed_form(self) -> ComputeWithReverse | None:
        """See :func:`orthogonium.parametrizations.closed_form.closed_form`."""
        kind: Any = type(self)
        changed = overrides(kind, ("__call__", "forward", "orthogonalize", "turn"), "with_pullback")
        return None if changed else self._compute_with_reverse

    def _compute_with_reverse(self, free: list[Tensor]) -> tuple[list[Tensor], Reverse]:
        self.check_shape(free[0])
        weight, pullback = self.with_pullback(free[0])
        return [weight], lambda grads: [None if grads[0] is None else pullback(grads[0])]

    def orthogonalize_stack(self, peers: Sequence["Orthogonalization"], stack: Tensor) -> Tensor:
        """Several weights of one shape at once; ``peers`` are their hooks, in order."""
        return self.orthogonalize(stack)

    def check_shape(self, weight: Tensor) -> None:
        if tuple(weight.shape[-2:]) != self.weight_shape[-2:]:
            raise ValueError(f"weight must have shape {self.weight_shape}, got {tuple(weight.shape)}")

    def forward(self, weight: Tensor) -> Tensor:
        self.check_shape(weight)
        return self.orthogonalize(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A free matrix that gives ``weight`` back, or the nearest orthogonal matrix to it."""
        check_same_shape("weight", weight, self.weight_shape)
        return _nearest(weight)

    def extra_repr(self) -> str:
        return str(self.weight_shape)


def _nearest(weight: Tensor) -> Tensor:
    """``weight`` itself where it is orthogonal to rounding, else its polar factor."""
    check_floating("weight", weight)
    if weight.is_meta or weight.numel() == 0:
        return weight
    eps = torch.finfo(weight.dtype).eps
    if bool((orthogonality_defect(weight) <= 4 * min(weight.shape[-2:]) ** 0.5 * eps).all()):
        return weight
    return polar(weight)


class BatchedPolarOrthogonalization(Orthogonalization):
    """The nearest orthogonal matrix, by :func:`orthogonium.linalg.polar`."""

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        return polar(matrix)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return polar_with_pullback(matrix)


class BatchedSVDOrthogonalization(Orthogonalization):
    """The nearest orthogonal matrix as ``U Vᵀ`` of the float64 singular value decomposition: slow, beyond doubt.

    The derivative is that of the polar factor, finite also where singular values repeat.
    """

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        return polar_by_svd(matrix)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return polar_with_pullback(matrix, SVD_ONLY)


class BatchedBjorckOrthogonalization(Orthogonalization):
    """The fixed point of the Björck iteration ``X → (1 + β) X − β X Xᵀ X``, which is the nearest orthogonal matrix.

    Every β in (0, 1) has that fixed point; it is reached through :func:`orthogonium.linalg.polar` instead of step by
    step, and its exact derivative does not depend on the path.

    Args:
        weight_shape: ``(..., m, n)``.
        beta: step of the iteration, in (0, 1). Matters to ``pass_through`` alone.
        niters: the budget: the products of this many steps may be spent on polynomials before a factorisation is
        preferred.
        pass_through: a cheaper, approximate derivative that stores nothing but the weight: the one that ``niters``
        steps
            have at their fixed point. Exact near orthogonal matrices for ``beta=0.5``, poor for ill-conditioned ones.

    Raises:
        ValueError: ``beta`` outside (0, 1) or ``niters < 0``.
    """

    def __init__(
        self, weight_shape: Sequence[int], beta: float = 0.5, niters: int = 12, pass_through: bool = False
    ) -> None:
        super().__init__(weight_shape)
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), where the iteration converges, got {beta}")
        if niters < 0:
            raise ValueError(f"niters must not be negative, got {niters}")
        self.beta, self.niters, self.pass_through = beta, niters, pass_through

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        if self.pass_through:
            return polar_pass_through(matrix, self.beta, self.niters)
        return polar(matrix, self.niters)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        if self.pass_through:
            return polar_pass_through_with_pullback(matrix, self.beta, self.niters)
        return polar_with_pullback(matrix, self.niters)

    def extra_repr(self) -> str:
        tail = ", pass_through=True" if self.pass_through else ""
        return f"{self.weight_shape}, beta={self.beta}, niters={self.niters}{tail}"


class BatchedCholeskyOrthogonalization(Orthogonalization):
    """The Gram–Schmidt factor by :func:`orthogonium.linalg.cholesky_orthogonalize`: the fastest exact method.

    Args:
        weight_shape: ``(..., m, n)``.
        stable: keep the factor accurate to ``eps κ`` for ill-conditioned weights (orthogonal it is in any case).
    """

    def __init__(self, weight_shape: Sequence[int], stable: bool = False) -> None:
        super().__init__(weight_shape)
        self.stable = stable

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        return cholesky_orthogonalize(matrix, self.stable)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return gram_schmidt_with_pullback(matrix, "cholesky_stable" if self.stable else "cholesky")

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, stable={self.stable}"


class BatchedQROrthogonalization(Orthogonalization):
    """The Gram–Schmidt factor by Householder reflections, :func:`orthogonium.linalg.qr_orthogonalize`."""

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        return qr_orthogonalize(matrix)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return gram_schmidt_with_pullback(matrix, "householder")


class _SkewOrthogonalization(Orthogonalization):
    """A base frame turned by a skew matrix that the free matrix spans.

    The base is the buffer ``base``: the identity's first rows or columns, until a weight is assigned, which then
    becomes the base, and the free matrix zero. A square weight keeps the sign of its base's determinant.
    """

    scale_invariant = False
    base: Tensor  # weight_shape

    def __init__(self, weight_shape: Sequence[int]) -> None:
        super().__init__(weight_shape)
        self.register_buffer("base", torch.eye(*self.weight_shape[-2:]).expand(self.weight_shape).clone())

    def turn(self, free: Tensor, base: Tensor) -> Tensor:
        raise NotImplementedError

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        return in_working_precision(lambda free: self.turn(free, self.base.to(free.dtype)))(matrix)

    def orthogonalize_stack(self, peers: Sequence[Orthogonalization], stack: Tensor) -> Tensor:
        bases = torch.stack([peer.base for peer in peers if isinstance(peer, _SkewOrthogonalization)])
        return in_working_precision(lambda free: self.turn(free, bases.to(free.dtype)))(stack)

    def _restore_base(self) -> None:
        """Another dtype has another rounding: make the base orthogonal to the present one's."""
        if self.base.dtype in (torch.float32, torch.float64):
            with torch.no_grad():
                self.base = _nearest(self.base)

    def _apply(self, *args: Any, **kwargs: Any) -> "_SkewOrthogonalization":
        super()._apply(*args, **kwargs)
        if not self.base.is_meta and bool(self.base.isfinite().all()):  # `to_empty` leaves anything in there
            self._restore_base()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._restore_base()

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_same_shape("weight", weight, self.weight_shape)
        with torch.no_grad():
            self.base = _nearest(weight).detach().clone()
        return torch.zeros_like(weight)


class BatchedExponentialOrthogonalization(_SkewOrthogonalization):
    """``exp(A) Q₀`` with a skew ``A`` of any size: every rotation of the base is reached.

    Args:
        weight_shape: ``(..., m, n)``.
        niters: squarings of scaling and squaring before the eigenvectors of ``A`` are preferred; 7 go up to ``‖A‖₂ ≈
        80`` in
            float32.

    Raises:
        ValueError: ``niters < 0``.
    """

    def __init__(self, weight_shape: Sequence[int], niters: int = 7) -> None:
        super().__init__(weight_shape)
        if niters < 0:
            raise ValueError(f"niters must not be negative, got {niters}")
        self.niters = niters

    def turn(self, free: Tensor, base: Tensor) -> Tensor:
        return skew_frame(free, base, "exponential", self.niters)

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return skew_frame_with_pullback(matrix, self.base, "exponential", self.niters)

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, niters={self.niters}"


class BatchedCayleyOrthogonalization(_SkewOrthogonalization):
    """``(I − A/2)⁻¹ (I + A/2) Q₀`` with a skew ``A``: every rotation of the base but those by π."""

    def turn(self, free: Tensor, base: Tensor) -> Tensor:
        return skew_frame(free, base, "cayley")

    def with_pullback(self, matrix: Tensor) -> tuple[Tensor, Pullback]:
        return skew_frame_with_pullback(matrix, self.base, "cayley")
