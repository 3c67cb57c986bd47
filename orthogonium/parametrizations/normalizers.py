"""Scalings of a weight: by an estimate of its spectral norm, by the norm of its rows, or not at all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthogonium._checks import check_floating, check_same_shape, check_weight_shape
from orthogonium.linalg import in_working_precision, power_iteration


class BatchedIdentity(nn.Module):
    """The weight as it is: for orthogonalisers that need no scaling, or to switch one off.

    Args:
        weight_shape: ``(..., m, n)``, for the sake of a common signature.
    """

    scale_invariant = False

    def __init__(self, weight_shape: Sequence[int]) -> None:
        super().__init__()
        self.weight_shape = check_weight_shape(weight_shape)

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_same_shape("weight", weight, self.weight_shape)
        return weight


class BatchedPowerIteration(nn.Module):
    """``W / σ`` with ``σ`` an estimate of ``‖W‖₂`` by power iteration, so from below: a scale, not a bound.

    The left singular vector of the step before is kept in the buffer ``u`` and improved by ``power_it_niter`` steps at
    each reading in training mode; in evaluation mode nothing changes. The start is deterministic, a lost or non-finite
    vector is replaced, and a zero weight passes through as zero.

    Args:
        weight_shape: ``(..., m, n)``; the leading sides are a batch of matrices.
        power_it_niter: steps at each reading, at least 1.
        eps: vectors shorter than this share of the largest entry count as lost; estimates are kept above it.

    Raises:
        ValueError: a shape without a matrix, ``power_it_niter < 1`` or ``eps ≤ 0``.

    Source: Miyato, Kataoka, Koyama and Yoshida, "Spectral normalization for GANs", ICLR 2018.
    """

    u: Tensor  # (..., m)

    def __init__(self, weight_shape: Sequence[int], power_it_niter: int = 3, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight_shape = check_weight_shape(weight_shape)
        if power_it_niter < 1:
            raise ValueError(f"power_it_niter must be at least 1, got {power_it_niter}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.power_it_niter, self.eps = power_it_niter, eps
        rows = self.weight_shape[-2]
        start = torch.randn(rows, generator=torch.Generator().manual_seed(0))
        start = start / torch.linalg.vector_norm(start).clamp_min(1e-6)
        self.register_buffer("u", start.expand(self.weight_shape[:-1]).clone())

    def forward(self, weight: Tensor) -> Tensor:
        check_floating("weight", weight)
        return in_working_precision(self._normalized)(weight)

    def _normalized(self, weight: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight
        sigma, u, _ = power_iteration(weight, self.u.to(weight.dtype), self.power_it_niter, self.eps)
        if self.training and not torch._C._functorch.peek_interpreter_stack():
            with torch.no_grad():
                self.u.copy_(u)
        tiny = torch.finfo(weight.dtype).tiny
        return weight / sigma.clamp_min(tiny)[..., None, None]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, power_it_niter={self.power_it_niter}, eps={self.eps}"


class L2Normalize(nn.Module):
    """Divide by the Euclidean norm along ``dim``, or by the Frobenius norm of the whole tensor.

    With ``dim=1`` each row of a ``(m, n)`` weight has norm one, so that each output is 1-Lipschitz on its own. A slice
    that is exactly zero stays zero.

    Args:
        dim: an axis, several, or ``None`` for all.
    """

    def __init__(self, dim: int | tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        check_floating("weight", weight)
        work = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        axes = tuple(range(work.ndim)) if self.dim is None else self.dim
        largest = work.detach().abs().amax(axes, keepdim=True) if work.numel() else work.new_ones(())
        scaled = work / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(scaled, dim=axes, keepdim=True)
        return (scaled / torch.where(norm > 0, norm, 1.0)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
