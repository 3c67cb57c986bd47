"""Skew kernels of bounded norm, whose exponential is an orthogonal convolution for any number of channels."""

import math

import torch
from torch import Tensor, nn

from orthogonium._checks import check_floating
from orthogonium.linalg import NonFiniteError
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg.kernels import adjoint_kernel


class SkewKernel(nn.Module):
    """``A = M − M*``, scaled down where its norm could exceed ``angle``: ``A* = −A`` as an operator.

    The norm is bounded from above by the smaller of the largest absolute row sum and
    ``√Πk · ‖(R Rᵀ)²‖_F^(1/4)``, with ``R`` the kernel as a ``(c, c Πk)`` matrix.

    Args:
        angle: the largest norm, above 0 and finite: no singular direction is turned further than by this many radians.
        groups: of the convolution.

    Source: Singla and Feizi, "Skew orthogonal convolutions", ICML 2021; the bound by the reshaped kernel from the same
    authors' "Fantastic four", ICLR 2021.
    """

    scale_invariant = True

    def __init__(self, angle: float = 2.0, groups: int = 1) -> None:
        super().__init__()
        if not 0 < angle < math.inf:
            raise ValueError(f"angle must be positive and finite, got {angle}")
        self.angle, self.groups = float(angle), groups

    def forward(self, free: Tensor) -> Tensor:
        check_floating("weight", free)
        work = free if free.dtype in (torch.float32, torch.float64) else free.float()
        with without_autocast(free):
            largest = work.detach().abs().amax() if work.numel() else work.new_ones(())
            unit = torch.where(largest > 1, largest, 1.0)
            skew = work / unit - adjoint_kernel(work / unit, self.groups)
            bound = _norm_bound(skew, self.groups) * unit * (1 + 64 * torch.finfo(work.dtype).eps)
            return (skew * (unit * self.angle / bound.clamp_min(self.angle))).to(free.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Half of the skew part; a skew kernel within the bound comes back."""
        if weight.is_meta:
            return weight
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"weight of shape {tuple(weight.shape)} holds NaN or Inf")
        return (weight - adjoint_kernel(weight, self.groups)) / 4

    def extra_repr(self) -> str:
        return f"angle={self.angle}, groups={self.groups}"


def _norm_bound(kernel: Tensor, groups: int) -> Tensor:
    rows = kernel.flatten(1).abs().sum(-1).amax()
    matrices = kernel.unflatten(0, (groups, -1)).flatten(2)
    gram = matrices @ matrices.mT
    fourth = torch.linalg.matrix_norm(gram @ gram).amax()
    root = torch.where(fourth > 0, torch.where(fourth > 0, fourth, 1.0) ** 0.25, 0.0)  # the root has no slope at zero
    reshaped = root * math.prod(kernel.shape[2:]) ** 0.5
    return torch.minimum(rows, reshaped)
