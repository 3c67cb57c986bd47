"""Orthogonal weights after every step of any optimiser, without a parametrization."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from orthogonium._selection import Selection, included
from orthogonium.surgery._projectable import ConvRule, find_projectable
from orthogonium.surgery.projection import Frames, project


class KeptOrthogonal:
    """The handle that :func:`keep_orthogonal` returns; as a context manager it removes itself at the end.

    Attributes:
        names: the weights that are projected.
        left: those that are not, and why.
        steps: of the optimiser, counted since.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int,
        include: Selection | None,
        exclude: Selection | None,
        conv: ConvRule,
    ) -> None:
        sites, self.left = find_projectable(model, included(include, exclude, by_owner=True), conv, frozen=False)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._sites = [site for site in sites if any(id(p) in owned for p in site.parameters())]
        taken = {site.path for site in self._sites}
        self.left |= {site.path: "not in this optimizer" for site in sites if site.path not in taken}
        if not self._sites:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.left.items()) or "no weight was found"
            raise ValueError(f"there is nothing to keep orthogonal ({reasons})")
        self.every, self.steps = every, 0
        self._frames = Frames()
        self._moved: list[Tensor | None] = []
        self.project()
        refused = [s.path for s, moved in zip(self._sites, self._moved, strict=True) if moved is None]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: the parametrization does not give back an orthogonal weight that it is set to. "
                "Remove it, or exclude these."
            )
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def names(self) -> list[str]:
        return [site.path for site in self._sites]

    @property
    def drift(self) -> dict[str, float]:
        """How far each weight was when it was last projected, as in :class:`ProjectionReport`."""
        pairs = zip(self._sites, self._moved, strict=True)
        return {site.path: float(moved) for site, moved in pairs if moved is not None}

    def project(self) -> None:
        """Project now."""
        with torch.no_grad():
            self._moved = project(self._sites, self._frames)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.project()

    def remove(self) -> None:
        """Let the optimiser go on alone; the weights stay as they are."""
        self._hook.remove()

    def __enter__(self) -> "KeptOrthogonal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"KeptOrthogonal({len(self._sites)} weights, every={self.every}, steps={self.steps})"


def keep_orthogonal(
    model: nn.Module,
    optimizer: Optimizer,
    every: int = 1,
    include: Selection | None = None,
    exclude: Selection | None = None,
    *,
    conv: ConvRule = "kernel",
) -> KeptOrthogonal:
    """Project the weights now, and again after each step of the optimiser, as :func:`orthogonalize_model` does.

    A small step leaves a weight close to orthogonal, where the nearest orthogonal matrix costs three to five products:
    a polynomial whose error is bounded before anything is spent. Larger steps are noticed and take the general way.

    The hook belongs to the optimiser object: it survives ``optimizer.load_state_dict`` and learning-rate schedules,
    and a step that :class:`torch.amp.GradScaler` skips changes nothing. It is not part of a state dict, and torch
    leaves hooks out of copies and pickles of an optimiser: call this function again there. Weights loaded into the
    model are projected after the next step. Parameters that a later ``add_param_group`` brings are not among those
    kept: call this function again, with ``include``.

    Momentum and weight decay act on the weights as usual; what they do to singular values is undone.

    Args:
        model, include, exclude, conv: as in :func:`orthogonalize_model`. Weights that this optimiser does not move, and
            frozen ones, are left alone.
        optimizer: any of ``torch.optim`` or beyond, whose ``step`` runs post-step hooks.
        every: project after every so many steps.

    Returns:
        A handle: ``.remove()``, ``.drift``, ``.names``, ``.left``, ``.project()``.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: ``every`` below 1, nothing to project, or what :func:`orthogonalize_model` raises.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}")
    return KeptOrthogonal(model, optimizer, every, include, exclude, conv)
