"""Linear layers with a bound on their Lipschitz constant."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._checks import check_count
from orthogonium.layers.constrain import constrain, orthogonal
from orthogonium.linalg import qr_orthogonalize
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, BatchedIdentity, L2Normalize, OrthoParams


class _ConstrainedLinear(nn.Linear):
    """What the constrained linear layers share: construction, initialisation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be real floating point, such as torch.float32, got {dtype}")
        super().__init__(in_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw a uniformly distributed orthogonal weight (Haar), and the bias as :class:`torch.nn.Linear` does."""
        constrained = is_parametrized(self, "weight")
        # the free tensor, since the weight of uninitialised or diverged memory cannot be computed
        present: Tensor = self.parametrizations.weight.original if constrained else self.weight  # type: ignore[union-attr, assignment]
        with torch.no_grad():
            if not present.is_meta:
                draw = torch.randn(present.shape, dtype=torch.float32, device=present.device)
                weight = qr_orthogonalize(draw).to(present.dtype)
                if constrained:
                    self.weight = weight
                else:
                    self.weight.copy_(weight)
            if self.bias is not None and self.bias.numel():
                bound = self.in_features**-0.5 if self.in_features > 0 else 0.0
                nn.init.uniform_(self.bias, -bound, bound)


class OrthoLinear(_ConstrainedLinear):
    """``y = W x + b`` with ``W`` orthogonal, so that distances never grow.

    They are preserved when ``out_features ≥ in_features``; otherwise those of inputs in the row space are.
    ``weight`` is an ordinary matrix to read, assign (the nearest orthogonal one is taken) and load from a plain
    ``nn.Linear`` checkpoint.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.
        ortho_params: how a free matrix becomes an orthogonal one.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: a negative size.
        TypeError: a size that is no integer, or a dtype that is not real floating point.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.ortho_params = ortho_params
        orthogonal(self, "weight", ortho_params)


class UnitNormLinear(_ConstrainedLinear):
    """``y = W x + b`` with rows of norm one: each output is 1-Lipschitz, all together ``√out_features`` at most.

    For the last layer of a classifier, where margins between pairs of outputs count.

    Args:
        in_features, out_features, bias, device, dtype: as in :class:`torch.nn.Linear`.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: a negative size.
        TypeError: a size that is no integer, or a dtype that is not real floating point.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        constrain(self, "weight", BatchedIdentity(self.weight.shape), L2Normalize(dim=1))
