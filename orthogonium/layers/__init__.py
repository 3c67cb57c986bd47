from orthogonium.layers.linear import OrthoLinear, UnitNormLinear

__all__ = ["OrthoLinear", "UnitNormLinear"]
