"""Orthogonalised momentum: steps in which every direction moves equally fast."""

from typing import Any

from torch import Tensor

from orthogonium.linalg import polar_retraction, soft_polar, tangent_projection
from orthogonium.optim._manifold import ManifoldOptimizer, State, adam_move, adam_state


class StiefelMuon(ManifoldOptimizer):
    """Orthogonalised momentum (Muon) along the orthogonal matrices.

    The tangent part of the momentum is replaced by its polar factor: all its singular values become one, so that a
    step turns every direction by about ``lr`` radians. For square matrices this is the steepest descent under a bound
    on the spectral norm of the step, exactly: the tangent space is ``W`` times the skew matrices, and the polar factor
    of a skew matrix is skew. For rectangular ones the polar factor is projected once more onto the tangent space.

    Groups with ``manifold=False`` get plain Muon for matrices ``(..., m, n)``, with updates of root mean square ``0.2
    lr`` as those of Adam, and AdamW for vectors.

    Args:
        params, manifold, blocks, tolerance, check_every, foreach, maximize: as in :class:`RiemannianSGD`.
        lr: the spectral norm of a step, an angle in radians.
        momentum, nesterov: of the gradient.
        weight_decay: decoupled, of groups with ``manifold=False`` alone.
        betas, eps: of AdamW, for vectors.

    Raises: as :class:`RiemannianSGD`.

    Source:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the scale of plain Muon is that
        of Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982; the constraint to orthogonal matrices
        follows Bernstein, "Modular manifolds", 2025.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
            "betas": betas,
            "eps": eps,
        }
        own |= {"manifold": manifold, "blocks": blocks, "tolerance": tolerance, "check_every": check_every}
        super().__init__(params, own | {"foreach": foreach, "maximize": maximize})

    def _new_state(self, point: Tensor, group: dict[str, Any]) -> State:
        if not group["manifold"] and point.ndim < 2:
            return adam_state(point)
        return {"momentum": point.new_zeros(point.shape)}

    @staticmethod
    def _direction(grads: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        momentum = state["momentum"].lerp_(grads, 1 - group["momentum"])
        return grads.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        direction = soft_polar(tangent_projection(points, self._direction(grads, state, group)))
        return polar_retraction(points, -group["lr"] * tangent_projection(points, direction))

    def _plain_move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        if "square" in state:
            return adam_move(points, grads, state, count, group)
        direction = soft_polar(self._direction(grads, state, group))
        shrunk = points * (1 - group["lr"] * group["weight_decay"])
        return shrunk.add_(direction, alpha=-0.2 * group["lr"] * max(points.shape[-2:]) ** 0.5)
