"""Updates of low rank for large recurrent matrices, at a fraction of the cost of a projection."""

from typing import Any, Literal

from torch import Tensor

from orthogonium.linalg import low_rank_factors
from orthogonium.linalg.low_rank import Sampling
from orthogonium.linalg.polar import polar_value
from orthogonium.linalg.retractions import geodesic_factors, polar_factors
from orthogonium.optim._manifold import ManifoldOptimizer, State, adam_move, adam_state


class LowRankOrthogonal(ManifoldOptimizer):
    """Orthogonal matrices moved by updates of rank ``k``, in ``O(n² k)`` a step and without a large factorisation.

    The gradient (or its momentum) is approximated by ``a bᵀ``; the matrix then becomes the orthogonal one nearest to
    ``W − lr · a bᵀ``, exactly (:func:`~orthogonium.linalg.low_rank_polar_update`), or goes along a geodesic. Meant for
    recurrent matrices, whose gradients, sums of outer products over time, are close to low rank.

    Groups with ``manifold=False`` get AdamW.

    Args:
        params, manifold, blocks, tolerance, check_every, foreach, maximize: as in :class:`RiemannianSGD`. The check
            every ``check_every`` steps costs one product of size ``n``.
        lr: factor of the gradient; with ``adaptive`` the root mean square of the entries of a step at full rank, as
            with Adam.
        rank: ``k``.
        update: ``"polar"`` or ``"geodesic"``.
        sampling: ``"subspace"`` (starts from the subspace of the step before) or ``"columns"``; see
            :func:`~orthogonium.linalg.low_rank_factors`.
        momentum: of the gradient, before it is approximated.
        adaptive: divide by the running root mean square of the gradient's entries, one number per matrix (its decay is
            ``betas[1]``).
        betas, eps: of AdamW, and see ``adaptive``.
        weight_decay: decoupled, of groups with ``manifold=False`` alone.

    Raises: as :class:`RiemannianSGD`.

    Source: Kiani, Balestriero, LeCun and Lloyd, "projUNN: efficient method for training deep networks with unitary
    matrices", NeurIPS 2022.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        rank: int = 8,
        update: Literal["polar", "geodesic"] = "polar",
        sampling: Sampling = "subspace",
        momentum: float = 0.0,
        adaptive: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
            "rank": rank,
            "update": update,
            "sampling": sampling,
            "momentum": momentum,
            "eps": eps,
            "adaptive": adaptive,
            "betas": betas,
            "weight_decay": weight_decay,
        }
        own |= {"manifold": manifold, "blocks": blocks, "tolerance": tolerance, "check_every": check_every}
        super().__init__(params, own | {"foreach": foreach, "maximize": maximize})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not isinstance(group["rank"], int) or group["rank"] < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {group['rank']!r}")
        for name, known in (("update", ("polar", "geodesic")), ("sampling", ("subspace", "columns"))):
            if group[name] not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {group[name]!r}")

    def _new_state(self, point: Tensor, group: dict[str, Any]) -> State:
        if not group["manifold"]:
            return adam_state(point)
        state: State = {}
        if group["momentum"]:
            state["momentum"] = point.new_zeros(point.shape)
        if group["adaptive"]:
            state["square"] = point.new_zeros((*point.shape[:-2], 1, 1))
        if group["sampling"] == "subspace":
            *batch, m, n = point.shape
            state["right"] = point.new_empty((*batch, n, min(group["rank"], m, n))).normal_()
        return state

    def _move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        direction = grads
        if group["momentum"]:
            momentum = state["momentum"].lerp_(grads, 1 - group["momentum"])
            direction = momentum / (1 - group["momentum"] ** count)
        left, right = low_rank_factors(direction, group["rank"], group["sampling"], start=state.get("right"))
        if "right" in state:
            state["right"].copy_(right)
        scale: float | Tensor = group["lr"]
        if group["adaptive"]:
            beta = group["betas"][1]
            square = state["square"].lerp_(grads.square().mean((-2, -1), keepdim=True), 1 - beta)
            scale = group["lr"] / (square / (1 - beta**count)).sqrt_().add_(group["eps"])
        left = left * -scale
        if group["update"] == "geodesic":
            factors = geodesic_factors(points, left, right)
        else:
            found = polar_factors(points, left, right)
            if found is None:
                return polar_value(points + left @ right.mT)
            factors = found
        if points.shape[0] == 1 and points.ndim == 3:  # a single matrix moves where it lies
            points[0].addmm_(factors[0][0], factors[1][0].mT)
            return points
        return points + factors[0] @ factors[1].mT

    def _plain_move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        return adam_move(points, grads, state, count, group)
