from orthogonium.layers.activations import GroupSort, MaxMin
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear

__all__ = ["GroupSort", "MaxMin", "OrthoLinear", "UnitNormLinear"]
