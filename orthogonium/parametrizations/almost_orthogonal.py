"""Kernels rescaled channel by channel so that the convolution never expands: cheap, and only almost orthogonal."""

import torch
from torch import Tensor, nn

from orthogonium._checks import check_floating
from orthogonium.linalg import NonFiniteError
from orthogonium.linalg._precision import without_autocast
from orthogonium.linalg.kernels import convolve

_PERRON_STEPS = 200


class AlmostOrthogonalKernel(nn.Module):
    """``K D`` with ``D`` diagonal over channels: ``D_i = (Σ_j Σ_t |(Kᵀ K)_ij[t]|)^(−1/2)``.

    The norm is at most one under zero and circular padding, with any stride and dilation, whatever ``K``. The channels
    are the inputs', or the outputs' with ``K Kᵀ`` where those are fewer. An orthogonal kernel stays as it is.

    A weight can be assigned: with ``c`` the Perron vector of ``Σ_t |Kᵀ K|[t]`` and ``ρ`` its root, the free kernel ``K
    c`` gives ``K / √ρ``. So every weight that this hook returns comes back unchanged, and any other is scaled to the
    same form.

    Args:
        groups: of the convolution.

    Source: Prach and Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks", ECCV 2022.
    """

    scale_invariant = True

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, free: Tensor) -> Tensor:
        check_floating("weight", free)
        work = free if free.dtype in (torch.float32, torch.float64) else free.float()
        with without_autocast(free):
            grouped = _scaled(work).unflatten(0, (self.groups, -1))
            columns = grouped.shape[2] <= grouped.shape[1]
            sums = _interactions(grouped, columns).sum(-1)
            scale = torch.where(sums > 0, sums, 1.0).rsqrt()
            scale = scale.unsqueeze(1) if columns else scale.unsqueeze(2)
            return (grouped * scale[(..., *(None,) * (free.ndim - 2))]).flatten(0, 1).to(free.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A free kernel for ``weight / √ρ``.

        Raises:
            ValueError: NaN or Inf.
        """
        if weight.is_meta or weight.numel() == 0:
            return weight
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"weight of shape {tuple(weight.shape)} holds NaN or Inf")
        grouped = weight.double().unflatten(0, (self.groups, -1))
        columns = grouped.shape[2] <= grouped.shape[1]
        interactions = _interactions(grouped, columns)
        perron = interactions.new_ones(interactions.shape[:-1])
        for _ in range(_PERRON_STEPS):
            perron = (interactions @ perron.unsqueeze(-1)).squeeze(-1)
            perron = (perron / perron.amax(-1, keepdim=True).clamp_min(1e-300)).clamp_min(1e-6)
        perron = perron.unsqueeze(1) if columns else perron.unsqueeze(2)
        return (grouped * perron[(..., *(None,) * (weight.ndim - 2))]).flatten(0, 1).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


def _scaled(kernel: Tensor) -> Tensor:
    """Divided by its largest entry: the result does not depend on it, and squares neither overflow nor vanish."""
    largest = kernel.detach().abs().amax() if kernel.numel() else kernel.new_ones(())
    return kernel / torch.where(largest > 0, largest, 1.0)


def _interactions(grouped: Tensor, columns: bool) -> Tensor:
    """``(groups, c, c)``: ``Σ_t |(Kᵀ K)[t]|`` over input channels, or with ``K Kᵀ`` over output channels."""
    kernels = grouped.transpose(1, 2) if columns else grouped
    padding = [k - 1 for k in kernels.shape[3:]]
    # one channel of the convolution per channel that is summed over, one group after another
    found = [convolve(kernel, kernel, padding=padding) for kernel in kernels.unbind(0)]
    return torch.stack(found).abs().flatten(3).sum(-1)
