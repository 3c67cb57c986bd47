"""Layers with a bound on their Lipschitz constant."""

from orthogonium.layers.activations import GroupSort, MaxMin
from orthogonium.layers.constrain import constrain, fused, orthogonal
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear

__all__ = ["GroupSort", "MaxMin", "OrthoLinear", "UnitNormLinear", "constrain", "fused", "orthogonal"]
