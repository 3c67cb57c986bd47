"""Normalisation that never grows a distance: centring, and scales of at most one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthogonium._checks import as_tuple, check_count


class BatchCentering(nn.Module):
    """Subtract the mean of each channel: over the batch while training, a running mean in evaluation.

    Centring a batch is an orthogonal projection, and a shift in evaluation mode, so no distance grows. The running mean
    is a buffer and travels with the state dict. It is the plain average of the batches seen until these weigh less than
    ``momentum``, so that it is right from the first batch on and does not start from zero.

    Args:
        num_features: channels, axis 1 of the input.
        momentum: weight of a new batch in the running mean, in (0, 1]; ``None`` averages all batches alike.
        bias: learn a shift that is added.

    Shape:
        ``(batch, num_features, …)``, and the same after.

    Raises:
        ValueError: ``momentum`` outside (0, 1].
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features)
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1] or None, got {momentum}")
        self.num_features, self.momentum = num_features, momentum
        if bias:
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, features: Tensor) -> Tensor:
        features = features.unflatten(1, (self.num_features,))  # no broadcasting of other sizes
        mean = self._mean(features)
        shift = mean if self.bias is None else mean - self.bias
        return (features.transpose(1, -1) - shift).transpose(1, -1)

    def _mean(self, features: Tensor) -> Tensor:
        if not self.training or features.numel() == 0:  # no batch to count
            return self.running_mean
        mean = features.transpose(1, -1).flatten(0, -2).mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self._count_batch())
        return mean

    def _count_batch(self) -> Tensor:
        """The weight of the batch at hand."""
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        return weight if self.momentum is None else weight.clamp_min(self.momentum)

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"


class LipschitzBatchNorm(BatchCentering):
    """Batch normalisation whose largest channel factor is at most one, so that no distance grows.

    Channels are centred as in :class:`BatchCentering` and multiplied by ``w / σ``, with a learnt weight ``w`` and the
    running standard deviation ``σ``, as in :class:`torch.nn.BatchNorm2d`; where the largest factor exceeds one, all of
    them are divided by it. Channels are so brought to one size among themselves. The factors do not depend on the batch
    at hand, in training neither, so the bound holds in both modes.

    Args:
        num_features: channels, axis 1 of the input.
        momentum, bias: as in :class:`BatchCentering`, for the variance too.
        eps: added to the variance.

    Shape:
        ``(batch, num_features, …)``, and the same after.

    Raises:
        ValueError: ``momentum`` outside (0, 1], or ``eps ≤ 0``.
    """

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum, bias, device=device, dtype=dtype)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def factors(self) -> Tensor:
        """What each channel is multiplied by: ``(num_features,)``, absolute values at most one."""
        found = self.weight / torch.sqrt(self.running_var + self.eps)
        return found / found.abs().amax().clamp_min(1.0)

    def forward(self, features: Tensor) -> Tensor:
        features = features.unflatten(1, (self.num_features,))  # no broadcasting of other sizes
        mean = self._mean(features)
        scaled = (features.transpose(1, -1) - mean) * self.factors()
        return (scaled if self.bias is None else scaled + self.bias).transpose(1, -1)

    def _mean(self, features: Tensor) -> Tensor:
        if not self.training or features.numel() == 0:
            return self.running_mean
        flat = features.transpose(1, -1).flatten(0, -2)
        mean = flat.mean(0)
        with torch.no_grad():
            weight = self._count_batch()
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((flat - mean).square().mean(0).to(self.running_var.dtype), weight)
        return mean

    def reset_running_stats(self) -> None:
        """Forget the batches seen."""
        super().reset_running_stats()
        self.running_var.fill_(1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class LayerCentering(nn.Module):
    """Subtract the mean over the last axes: an orthogonal projection, without any state.

    The linear part of :class:`torch.nn.LayerNorm`; dividing by the standard deviation has no Lipschitz constant.

    Args:
        normalized_shape: of the last axes, as in :class:`torch.nn.LayerNorm`.
        bias: learn a shift that is added.

    Shape:
        ``(…, *normalized_shape)``, and the same after.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dims = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
        self.normalized_shape = as_tuple("normalized_shape", normalized_shape, dims, least=1)
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.normalized_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, features: Tensor) -> Tensor:
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred = features - features.mean(axes, keepdim=True)
        return centred if self.bias is None else centred + self.bias

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, bias={self.bias is not None}"
