"""What the optimisers on orthogonal matrices share: groups, batches of equal shapes, the way back to the manifold."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from orthogonium.linalg import NonFiniteError
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg.polar import polar_value

State = dict[str, Tensor]
_ACCEPTED = (torch.float32, torch.float64)


class ManifoldOptimizer(Optimizer):
    """An optimiser whose groups live on the orthogonal matrices (``manifold=True``) or in plain space.

    Every group may set these besides the options of the subclass:

    - ``manifold``: the parameters are matrices ``(..., m, n)``, leading sides a batch, kept with orthonormal rows or
      columns, whichever are fewer.
    - ``blocks``: the first matrix side is this many matrices stacked, as the gates of ``nn.LSTM.weight_hh_l0`` (4).
    - ``check_every``, ``tolerance``: at the first step and at every so many later ones the distance ``‖I − QQᵀ‖_F`` of
      each matrix is measured, and one beyond the tolerance (``8 √n eps`` by default) is replaced by its polar factor.
      So a start that is not orthogonal is projected, and rounding never adds up.
    - ``foreach``: matrices of one shape take their step in one batched call.
    - ``maximize``: go uphill.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, after checking that the group's options are meant for it.

        Raises:
            ValueError: an option out of range; a vector, a half-precision or an integer tensor in a manifold group.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if name in group and not float(group[name]) >= 0:
                raise ValueError(f"{name} must not be negative, got {group[name]}")
        if "momentum" in group and not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if "betas" in group and not (len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
        for name in ("check_every", "blocks"):
            if not isinstance(group[name], int) or group[name] < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {group[name]!r}")
        if group["tolerance"] is not None and not group["tolerance"] > 0:
            raise ValueError(f"tolerance must be positive or None, got {group['tolerance']}")
        for parameter in group["params"]:
            shape = tuple(parameter.shape)
            if parameter.is_complex():
                raise TypeError(
                    f"a parameter of shape {shape} is {parameter.dtype}, and these steps are for real numbers: give it "
                    "to another optimizer, or keep torch.view_as_real of it in a group with 'manifold': False"
                )
            if not group["manifold"]:
                continue
            if parameter.ndim < 2:
                raise ValueError(
                    f"a parameter of shape {shape} is no matrix. Put biases and norms into a group of their own: "
                    "{'params': [...], 'manifold': False}; orthogonium.parameter_groups(model, manifold=...) does."
                )
            if not parameter.is_floating_point():
                raise TypeError(
                    f"a parameter of shape {shape} is {parameter.dtype}, and these matrices are real: use "
                    "torch.float32 or torch.float64, or a group with 'manifold': False of another optimizer"
                )
            if parameter.dtype not in _ACCEPTED:
                raise TypeError(
                    f"a parameter of shape {shape} is {parameter.dtype}, in which small steps along the manifold round "
                    "to nothing. Keep it in float32 and use autocast for the forward pass."
                )
            if shape[-2] % group["blocks"]:
                raise ValueError(f"blocks={group['blocks']} does not divide the {shape[-2]} rows of shape {shape}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` evaluates the model again and returns the loss.

        Raises:
            NonFiniteError: (a ``ValueError``) NaN or Inf in a gradient; nothing has been changed then.
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_gradients(group)
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None and p.numel()]
            for bucket, taken in self._buckets(live, group):
                with without_autocast(bucket[0]):
                    self._bucket_step(bucket, taken, group)
        return loss

    def _buckets(self, live: Sequence[Tensor], group: dict[str, Any]) -> Iterable[tuple[list[Tensor], int]]:
        """Parameters that step together, with the number of steps behind them."""
        found: dict[Any, list[Tensor]] = defaultdict(list)
        for number, parameter in enumerate(live):
            key = (tuple(parameter.shape), parameter.dtype, parameter.device, self.state[parameter].get("step", 0))
            found[key if group["foreach"] else (*key, number)].append(parameter)
        return [(bucket, key[3]) for key, bucket in found.items()]

    def _bucket_step(self, bucket: list[Tensor], taken: int, group: dict[str, Any]) -> None:
        blocks = group["blocks"] if group["manifold"] else 1

        def split(stack: Tensor) -> Tensor:
            return stack.unflatten(-2, (blocks, -1)) if blocks > 1 else stack

        points, grads = split(_stacked(bucket)), split(_stacked([p.grad for p in bucket if p.grad is not None]))
        grads = -grads if group["maximize"] else grads
        states = [self.state[parameter] for parameter in bucket]
        names = self._refresh(states, points[0], group)
        stacked = {name: _stacked([state[name] for state in states]) for name in names}
        if group["manifold"]:
            if taken % group["check_every"] == 0:
                points = returned(points, group["tolerance"])
            points = self._move(points, grads, stacked, taken + 1, group)
        else:
            points = self._plain_move(points, grads, stacked, taken + 1, group)
        _unstack(points.flatten(-3, -2) if blocks > 1 else points, bucket)
        for name in names:
            _unstack(stacked[name], [state[name] for state in states])
        for state in states:
            state["step"] = taken + 1

    def _refresh(self, states: Sequence[dict[str, Any]], point: Tensor, group: dict[str, Any]) -> list[str]:
        """Names of what the group's options ask for; made where missing, as when a schedule turns momentum on."""
        wanted = self._new_state(torch.empty(point.shape, dtype=point.dtype, device="meta"), group)
        for state in states:
            stale = [name for name, like in wanted.items() if name not in state or state[name].shape != like.shape]
            if stale:
                fresh = self._new_state(point, group)
                state.update({name: fresh[name] for name in stale})
        return list(wanted)

    def _new_state(self, point: Tensor, group: dict[str, Any]) -> State:
        """The state of one parameter, ``point`` being its value as a batch of blocks."""
        raise NotImplementedError

    def _move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        """New points on the manifold; ``state`` is updated in place. ``count`` is 1 at the first step."""
        raise NotImplementedError

    def _plain_move(self, points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
        """New points in plain space."""
        raise NotImplementedError


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One batch; of a single tensor a view, which may be changed in place."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _unstack(batch: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, new in zip(tensors, batch.unbind(0), strict=True):
        if tensor.data_ptr() != new.data_ptr():
            tensor.copy_(new)


def adam_state(point: Tensor) -> State:
    return {"momentum": torch.zeros_like(point), "square": torch.zeros_like(point)}


def adam_move(points: Tensor, grads: Tensor, state: State, count: int, group: dict[str, Any]) -> Tensor:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019)."""
    beta1, beta2 = group["betas"]
    momentum, square = state["momentum"], state["square"]
    momentum.lerp_(grads, 1 - beta1)
    square.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    scale = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    shrunk = points * (1 - group["lr"] * group["weight_decay"])
    return shrunk.addcdiv_(momentum, scale, value=-group["lr"] / (1 - beta1**count))


def returned(points: Tensor, tolerance: float | None) -> Tensor:
    """The points; those further than ``tolerance`` from orthogonal replaced by their polar factors."""
    short = points if points.shape[-2] <= points.shape[-1] else points.mT
    error = short @ short.mT
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    rows = short.shape[-2]
    limit = 8 * rows**0.5 * torch.finfo(points.dtype).eps if tolerance is None else tolerance
    far = ~(torch.linalg.matrix_norm(error) <= limit)
    if not bool(far.any()):
        return points
    result = points.clone()
    result[far] = polar_value(points[far])
    return result


def _check_gradients(group: dict[str, Any]) -> None:
    grads = [p.grad for p in group["params"] if p.grad is not None]
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError("sparse gradients are not supported: use torch.optim.SparseAdam for those parameters")
    by_device: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in grads:
        if grad.numel():  # an empty tensor has no largest entry
            by_device[grad.device].append(grad)
    for same in by_device.values():
        norms = torch._foreach_norm(same, float("inf"))
        if not bool(torch.stack([norm.double() for norm in norms]).isfinite().all()):
            bad = next(tuple(g.shape) for g, norm in zip(same, norms, strict=True) if not bool(norm.isfinite()))
            raise NonFiniteError(
                f"the gradient of a parameter of shape {bad} holds NaN or Inf. Lower the learning rate, clip "
                "gradients, or scale the loss with torch.amp.GradScaler, which skips such steps."
            )
