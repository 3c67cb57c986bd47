"""Layers with a bound on their Lipschitz constant."""

from orthogonium.layers.constrain import constrain, fused, orthogonal
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear

__all__ = ["OrthoLinear", "UnitNormLinear", "constrain", "fused", "orthogonal"]
