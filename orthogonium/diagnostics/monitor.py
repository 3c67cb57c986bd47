"""Singular values, orthogonality and gradients of every layer, logged while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orthogonium.diagnostics._operators import ConvolutionOperator, Estimates, MatrixOperator
from orthogonium.initialization.empirical._trees import rms
from orthogonium.initialization.empirical._updates import kept
from orthogonium.parametrizations.torch_weights import CONVOLUTIONS


class ScalarWriter(Protocol):
    """What is needed of a TensorBoard ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


Log = Callable[[int, Mapping[str, float]], Any] | ScalarWriter


class SpectralMonitor:
    """Log, every so many optimiser steps, what a layer does to its input and what reaches it from the loss.

    Per linear layer and convolution, under ``<layer>/<quantity>``:

    - ``sigma_max``, ``sigma_min``: extreme singular values of the weight, of a convolution as an operator on the images
      that it was last given.
    - ``defect``: ``‖I − QQᵀ‖₂`` on the shorter side.
    - ``gradient``: root mean square of the gradient of its parameters, before the step.

    Matrices with a side of at most ``exact`` are decomposed. Others, and convolutions, are followed by a few products
    that go on from the directions found last: ``sigma_max`` and ``defect`` then err low and ``sigma_min`` errs high,
    less so as training goes on.

    Args:
        model: watched, never changed; no gradient, mode or buffer is touched.
        log: called with the step and a dict of numbers; or anything with ``add_scalar(tag, value, step)``, such as
            TensorBoard's ``SummaryWriter``.
        optimizer: whose steps to count; without one, call :meth:`record` yourself.
        every: steps between records; the first step is recorded.
        exact: largest shorter side that is decomposed.
        iterations: products per record from each of the two directions.

    Raises:
        TypeError: ``log`` is neither.
        ValueError: ``every`` or ``iterations`` below one, or no layer to watch.
    """

    def __init__(
        self,
        model: nn.Module,
        log: Log,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 100,
        exact: int = 128,
        iterations: int = 4,
    ) -> None:
        if not callable(log) and not hasattr(log, "add_scalar"):
            raise TypeError(f"log must be callable or have add_scalar, got {type(log).__name__}")
        for name, value in (("every", every), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._log, self._every, self._exact, self._iterations = log, every, exact, iterations
        self._layers = {
            name or "model": m for name, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))
        }
        if not self._layers:
            raise ValueError("model holds no linear layer and no convolution of which to follow singular values")
        self.step = 0
        self._estimates: dict[str, Estimates] = {}
        self._image_shapes: dict[str, tuple[int, ...]] = {}
        self._handles: list[Any] = []
        for name, module in self._layers.items():
            if isinstance(module, nn.modules.conv._ConvNd):
                self._handles.append(module.register_forward_pre_hook(self._remember_shape(name)))
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._on_step))

    def record(self) -> dict[str, float]:
        """Measure and log now, as step :attr:`step`; the numbers that were logged."""
        values: dict[str, float] = {}
        with torch.no_grad():
            for name, module in self._layers.items():
                values |= {f"{name}/{key}": value for key, value in self._spectrum(name, module).items()}
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                if gradients:
                    count = sum(g.numel() for g in gradients)
                    values[f"{name}/gradient"] = (sum(rms(g) ** 2 * g.numel() for g in gradients) / count) ** 0.5
        if hasattr(self._log, "add_scalar"):
            for tag, value in values.items():
                self._log.add_scalar(tag, value, self.step)
        else:
            self._log(self.step, values)
        return values

    def remove(self) -> None:
        """Take all hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> SpectralMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _on_step(self, *_: Any) -> None:
        if self.step % self._every == 0:
            self.record()
        self.step += 1

    def _remember_shape(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                dims = module.weight.ndim - 1  # type: ignore[operator]
                self._image_shapes[name] = tuple(args[0].shape[-dims:])

        return hook

    def _spectrum(self, name: str, module: nn.Module) -> dict[str, float]:
        with kept(list(module.buffers())):
            if isinstance(module, nn.Linear):
                weight = module.weight.detach().float()
                if min(weight.shape) <= self._exact:
                    return _exact_spectrum(weight)
                operator: MatrixOperator | ConvolutionOperator = MatrixOperator(weight)
            elif name in self._image_shapes:
                operator = ConvolutionOperator(module, self._image_shapes[name])
            else:
                return {}
            estimates = self._estimates.get(name)
            if estimates is None or not estimates.fits(operator):
                estimates = self._estimates[name] = Estimates(operator)
            return estimates.update(operator, self._iterations)


def _exact_spectrum(weight: Tensor) -> dict[str, float]:
    """From the eigenvalues of the Gram matrix in float64, which keeps eight digits down to 1e-8 of the largest."""
    short = (weight if weight.shape[0] <= weight.shape[1] else weight.T).double()
    if not bool(torch.isfinite(short).all()):
        return dict.fromkeys(("sigma_max", "sigma_min", "defect"), float("nan"))
    squares = torch.linalg.eigvalsh(short @ short.T).clamp_min(0)
    least, most = float(squares[0]), float(squares[-1])
    return {"sigma_max": most**0.5, "sigma_min": least**0.5, "defect": max(abs(1 - least), abs(most - 1))}
