"""Gradient descent and Adam along the orthogonal matrices."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from orthogonium.linalg import cayley_retraction, geodesic_retraction, polar_retraction, tangent_projection
from orthogonium.optim._manifold import ManifoldOptimizer, State, adam_move, adam_state

Retraction = Literal["polar", "cayley", "geodesic"]
RETRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polar": polar_retraction,
    "cayley": cayley_retraction,
    "geodesic": geodesic_retraction,
}


class _Riemannian(ManifoldOptimizer):
    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["retraction"] not in RETRACTIONS:
            raise ValueError(f"retraction must be one of {', '.join(RETRACTIONS)}, got {group['retraction']!r}")


class RiemannianSGD(_Riemannian):
    """Gradient descent with momentum on orthogonal matrices.

    The gradient is projected onto the tangent space, added to the momentum, which is carried along by projection onto
    the tangent space of where the matrix is now, and the step is retracted.

    Args:
        params: parameters or groups of them. Without ``manifold=False`` they are matrices ``(..., m, n)``, leading
            sides a batch. A convolution kernel is *not* a batch of ``k × k`` matrices: keep those with
            :func:`orthogonium.keep_orthogonal`.
        lr: a step of Frobenius norm ``lr · ‖gradient‖``.
        momentum, nesterov: as in :class:`torch.optim.SGD`.
        weight_decay: decoupled, of groups with ``manifold=False`` alone: the norm of an orthogonal matrix cannot decay.
        retraction: ``"polar"`` (the nearest orthogonal matrix; never drifts), ``"cayley"`` or ``"geodesic"`` (keep the
            determinant).
        manifold, blocks, tolerance, check_every, foreach: per group; see the page "Keep weights orthogonal".
        maximize: go uphill.

    Raises:
        ValueError: an option out of range, or a vector in a manifold group.
        TypeError: a half-precision parameter in a manifold group.

    Source: Absil, Mahony and Sepulchre, *Optimization Algorithms on Matrix Manifolds*, Princeton 2008, chapter 4.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        retraction: Retraction = "polar",
        *,
        manifold: bool = True,
        blocks: int = 1,
        tolerance: float | None = None,
        check_every: int = 100,
        foreach: bool = True,
        maximize: bool = False,
    ) -> None:
        own: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "retraction": retraction,
        }
        own |= {"manifold": manifold, "blocks": blocks, "tolerance": tolerance, "check_every": check_every}
        super().__init__(params, own | {"foreach": foreach, "maximize": maximize})

    def _new_state(self, point: Tensor, group: dict[str, Any]) -> State:
        return {"momentum": point.new_zeros(point.shape)} if group["momentum"] else {}

    def _move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        direction = tangent_projection(points, grads)
        if group["momentum"]:
            carried = tangent_projection(points, state["momentum"])
            momentum = state["momentum"].copy_(carried.mul_(group["momentum"]).add_(direction))
            direction = direction.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        return RETRACTIONS[group["retraction"]](points, -group["lr"] * direction)

    def _plain_move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        direction = grads
        if group["momentum"]:
            momentum = state["momentum"].mul_(group["momentum"]).add_(grads)
            direction = grads.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        return (points * (1 - group["lr"] * group["weight_decay"])).add_(direction, alpha=-group["lr"])


class RiemannianAdam(_Riemannian):
    """Adam on orthogonal matrices, with one second moment per matrix.

    Dividing entry by entry would leave the tangent space and depend on the basis; so each matrix has a single scale,
    the running mean of the squared entries of its tangent gradient. A step then has entries of about ``lr``, as with
    Adam, and learning rates carry over. Groups with ``manifold=False`` get AdamW as usual.

    Args:
        params, weight_decay, retraction, manifold, blocks, tolerance, check_every, foreach, maximize: as in
            :class:`RiemannianSGD`.
        lr: root mean square of the entries of a step. It turns an ``n × n`` matrix by about ``2 √n · lr`` radians.
        betas: decay of the mean and of the squared scale of the gradient.
        eps: added to the scale.

    Raises: as :class:`RiemannianSGD`.

    Source: Bécigneul and Ganea, "Riemannian adaptive optimization methods", ICLR 2019: one adaptive scale per factor of
    a product of manifolds.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        retraction: Retraction = "polar",
        *,
        manifold: bool = True,
        blocks: int = 1,
        tolerance: float | None = None,
        check_every: int = 100,
        foreach: bool = True,
        maximize: bool = False,
    ) -> None:
        own: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "retraction": retraction,
        }
        own |= {"manifold": manifold, "blocks": blocks, "tolerance": tolerance, "check_every": check_every}
        super().__init__(params, own | {"foreach": foreach, "maximize": maximize})

    def _new_state(self, point: Tensor, group: dict[str, Any]) -> State:
        if not group["manifold"]:
            return adam_state(point)
        return {"momentum": point.new_zeros(point.shape), "square": point.new_zeros((*point.shape[:-2], 1, 1))}

    def _move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        direction = tangent_projection(points, grads)
        momentum = state["momentum"].copy_(tangent_projection(points, state["momentum"]))
        momentum.lerp_(direction, 1 - beta1)
        square = state["square"].lerp_(direction.square().mean((-2, -1), keepdim=True), 1 - beta2)
        scale = (square / (1 - beta2**count)).sqrt_().add_(group["eps"]) * (1 - beta1**count)
        return RETRACTIONS[group["retraction"]](points, momentum / scale * -group["lr"])

    def _plain_move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        return adam_move(points, grads, state, count, group)
