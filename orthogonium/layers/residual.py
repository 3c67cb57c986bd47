"""Residual blocks that never grow a distance."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthogonium._checks import as_tuple, check_count
from orthogonium.layers._circular import circular_pad
from orthogonium.layers.conv import _CONVOLUTIONS
from orthogonium.layers.conv_transposed import _TRANSPOSED


class ConvexResidual(nn.Module):
    """``(1 − α) s(x) + α f(x)`` with a learnt ``α`` in (0, 1): 1-Lipschitz if branch ``f`` and shortcut ``s`` are.

    A plain sum ``x + f(x)`` has a Lipschitz constant of up to two, and doubles distances block after block.

    Args:
        branch: a module; without a shortcut, with outputs of its input's shape.
        alpha: where ``α`` starts, in (0, 1).
        shortcut: a module with outputs of the branch's shape, such as a convolution with a stride; ``None`` is the
            identity.

    Shape:
        as the branch.

    Raises:
        ValueError: ``alpha`` outside (0, 1).
    """

    def __init__(self, branch: nn.Module, alpha: float = 0.5, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be in (0, 1), got {alpha}")
        self.branch = branch
        self.shortcut = shortcut
        self.logit = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha))))

    @property
    def alpha(self) -> Tensor:
        """The share of the branch, a scalar."""
        return torch.sigmoid(self.logit)

    def forward(self, features: Tensor) -> Tensor:
        direct = features if self.shortcut is None else self.shortcut(features)
        branch = self.branch(features)
        if torch._C._is_any_autocast_enabled():
            branch = branch.to(direct.dtype)  # one of them may have been rounded
        return torch.lerp(direct, branch, torch.sigmoid(self.logit).to(direct.dtype))


class _SLL(nn.Module):
    """``x − 2 W T⁻¹ ReLU(Wᵀ x + b)``; what dense and convolutional blocks share."""

    weight: nn.Parameter
    bias: nn.Parameter
    log_q: nn.Parameter

    def _make(self, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype))
        self.log_q = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights, whose scale does not matter, and zeros."""
        with torch.no_grad():
            if not self.weight.is_meta:
                self.weight.normal_(std=self.weight[0].numel() ** -0.5)
                self.bias.zero_()
                self.log_q.zero_()

    def _interactions(self) -> Tensor:
        """``(hidden, hidden)``: how strongly hidden units overlap, at most, over all shifts."""
        raise NotImplementedError

    def _steps(self, interactions: Tensor) -> Tensor:
        """``2 / T`` with ``T_i = Σ_j |Wᵀ W|_ij q_j / q_i``, zero where a hidden unit reads nothing."""
        q = torch.exp(self.log_q - self.log_q.detach().amax())
        total = (interactions * q).sum(-1) / q
        return torch.where(total > 0, 2 / torch.where(total > 0, total, 1.0), 0.0)


class SLLLinear(_SLL):
    """A dense residual block, ``x − 2 W T⁻¹ ReLU(Wᵀ x + b)``, that is 1-Lipschitz for every ``W``.

    ``T`` is diagonal with ``T ⪰ Wᵀ W``, by the dominance of its entries ``Σ_j |Wᵀ W|_ij q_j / q_i``. The Jacobian is
    ``I − 2 M`` with a symmetric ``0 ⪯ M ⪯ I``, so its eigenvalues lie in [−1, 1]. Weight, bias and the scales ``q`` are
    all used, and trained.

    Args:
        features: of input and output.
        hidden: units of the ReLU; as many by default.

    Shape:
        ``(…, features)``, and the same after.

    Source: Araujo, Havens, Delattre, Allauzen and Hu, "A unified algebraic perspective on Lipschitz neural networks",
    ICLR 2023.
    """

    def __init__(
        self,
        features: int,
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = features if hidden is None else hidden
        check_count("features", features)
        check_count("hidden", hidden)
        self.features, self.hidden = features, hidden
        self._make((hidden, features), device, dtype)

    def _interactions(self) -> Tensor:
        return (self.weight @ self.weight.mT).abs()

    def forward(self, input: Tensor) -> Tensor:
        active = F.relu(F.linear(input, self.weight, self.bias)) * self._steps(self._interactions())
        return input - F.linear(active, self.weight.mT)

    def extra_repr(self) -> str:
        return f"{self.features}, hidden={self.hidden}"


class _SLLConv(_SLL):
    _dims: ClassVar[int]

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        padding_mode: str = "circular",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        check_count("channels", channels)
        check_count("hidden", hidden)
        self.channels, self.hidden = channels, hidden
        self.kernel_size = as_tuple("kernel_size", kernel_size, self._dims, least=1)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size must be odd along each axis, to have a centre, got {self.kernel_size}")
        if padding_mode not in ("circular", "zeros"):
            raise ValueError(f"padding_mode must be 'circular' or 'zeros', got {padding_mode!r}")
        self.padding_mode = padding_mode
        self._make((hidden, channels, *self.kernel_size), device, dtype)

    def _interactions(self) -> Tensor:
        return self._overlaps(self.weight)

    def _overlaps(self, weight: Tensor) -> Tensor:
        convolution: Any = _CONVOLUTIONS[self._dims]
        overlaps: Tensor = convolution(weight, weight, padding=tuple(k - 1 for k in self.kernel_size))
        return overlaps.abs().flatten(2).sum(-1)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, channels, *sides)``, and the same after."""
        half = tuple(k // 2 for k in self.kernel_size)
        convolution: Any = _CONVOLUTIONS[self._dims]
        transposed: Any = _TRANSPOSED[self._dims]
        steps = self._steps(self._interactions()).view(-1, *(1,) * self._dims)
        if self.padding_mode == "zeros":
            active = F.relu(convolution(input, self.weight, self.bias, padding=half)) * steps
            return input - transposed(active, self.weight, padding=half)
        around = [(h, h) for h in half]
        wide = circular_pad(input, around)
        active = F.relu(convolution(wide, self.weight, self.bias)) * steps
        # the adjoint on a circle: the flipped kernel over the padded features
        flipped = self.weight.flip(tuple(range(2, 2 + self._dims))).transpose(0, 1)
        return input - convolution(circular_pad(active, around), flipped)

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, hidden={self.hidden}, kernel_size={self.kernel_size}"
        return f"{sizes}, padding_mode={self.padding_mode!r}"


_DOC = """A {n}-dimensional convolutional residual block that is 1-Lipschitz for every kernel; see :class:`SLLLinear`.

    Args:
        channels: of input and output.
        hidden: channels of the ReLU; as many by default.
        kernel_size: odd.
        padding_mode: ``"circular"`` or ``"zeros"``.

    Shape:
        ``(batch, channels, *sides)``, and the same after.

    Raises:
        ValueError: an even kernel or another padding.

    Source: Araujo, Havens, Delattre, Allauzen and Hu, "A unified algebraic perspective on Lipschitz neural networks",
    ICLR 2023.
    """


class SLLConv1d(_SLLConv):
    __doc__ = _DOC.format(n="one")
    _dims = 1


class SLLConv2d(_SLLConv):
    __doc__ = _DOC.format(n="two")
    _dims = 2


class SLLConv3d(_SLLConv):
    __doc__ = _DOC.format(n="three")
    _dims = 3
