"""Linear maps on their shorter side, and estimates that follow them through training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MatrixOperator:
    """``x ↦ A Aᵀ x`` (or ``Aᵀ A x``, whichever is smaller)."""

    def __init__(self, matrix: Tensor) -> None:
        self.short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        self.shape: tuple[int, ...] = (self.short.shape[0],)
        self.device = matrix.device

    def gram(self, x: Tensor) -> Tensor:
        return self.short @ (self.short.T @ x)


class ConvolutionOperator:
    """The Gram operator of a convolution on images of one size, by running the layer and its derivative."""

    def __init__(self, layer: nn.Module, image_shape: tuple[int, ...]) -> None:
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        self.device = weight.device
        with torch.enable_grad():
            self.image = torch.zeros(1, *image_shape, dtype=weight.dtype, device=weight.device).requires_grad_()
            self.output = layer(self.image)
            self.cotangent = torch.zeros_like(self.output).requires_grad_()
            (self.pulled,) = torch.autograd.grad(self.output, self.image, self.cotangent, create_graph=True)
        self.outputs_are_fewer = self.output.numel() < self.image.numel()
        self.shape = tuple((self.output if self.outputs_are_fewer else self.image).shape)

    def gram(self, x: Tensor) -> Tensor:
        if self.outputs_are_fewer:
            return self._forward(self._transpose(x))
        return self._transpose(self._forward(x))

    def _forward(self, image: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.pulled, self.cotangent, image.to(self.image.dtype), retain_graph=True)
        return found.float()

    def _transpose(self, output: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.output, self.image, output.to(self.output.dtype), retain_graph=True)
        return found.float()


class Estimates:
    """The directions found so far in which an operator stretches most and least."""

    def __init__(self, operator: MatrixOperator | ConvolutionOperator) -> None:
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(2, *operator.shape, generator=generator).to(operator.device)
        self.top, self.bottom = draws[0], draws[1]

    def fits(self, operator: MatrixOperator | ConvolutionOperator) -> bool:
        return tuple(self.top.shape) == operator.shape and self.top.device == operator.device

    def update(self, operator: MatrixOperator | ConvolutionOperator, steps: int) -> dict[str, float]:
        """Rayleigh–Ritz on the span of ``steps`` products with the Gram operator from each of the two directions.

        Largest and least Ritz value are squares of the estimates: from below and from above.
        """
        basis: list[Tensor] = []
        images: list[Tensor] = []
        for start in (self.top, self.bottom):
            vector: Tensor | None = _independent(start, basis)
            for _ in range(steps):
                if vector is None:
                    break
                basis.append(vector)
                images.append(operator.gram(vector))
                vector = _independent(images[-1], basis)
        if not basis or not bool(torch.isfinite(torch.stack(images)).all()):
            return dict.fromkeys(("sigma_max", "sigma_min", "defect"), float("nan"))
        span = torch.stack(basis).flatten(1)
        small = (span @ torch.stack(images).flatten(1).T).double()
        squares, vectors = torch.linalg.eigh((small + small.T) / 2)
        ends = vectors[:, [-1, 0]].to(span)
        self.top, self.bottom = (ends.T @ span).view(2, *operator.shape)
        least, most = max(float(squares[0]), 0.0), max(float(squares[-1]), 0.0)
        return {"sigma_max": most**0.5, "sigma_min": least**0.5, "defect": max(abs(most - 1), abs(1 - least))}


def _independent(vector: Tensor, basis: list[Tensor]) -> Tensor | None:
    """The part of ``vector`` that is new, normalised; ``None`` if rounding is all that is left."""
    size = float(vector.norm())
    if not 0 < size < float("inf"):
        return None
    vector = vector / size
    for _ in range(2):
        for other in basis:
            vector = vector - (vector * other).sum() * other
    left = float(vector.norm())
    return vector / left if left > 1e-4 else None
