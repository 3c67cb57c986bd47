"""Layers with a bound on their Lipschitz constant."""

from orthogonium.layers.activations import GroupSort, MaxMin
from orthogonium.layers.constrain import constrain, fused, orthogonal
from orthogonium.layers.conv import AdaptiveOrthoConv2d, OrthoConv1d, OrthoConv2d, OrthoConv3d
from orthogonium.layers.conv_transposed import (
    AdaptiveOrthoConvTranspose2d,
    OrthoConvTranspose1d,
    OrthoConvTranspose2d,
    OrthoConvTranspose3d,
)
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear
from orthogonium.layers.spectrum import singular_values

__all__ = [
    "AdaptiveOrthoConv2d",
    "AdaptiveOrthoConvTranspose2d",
    "GroupSort",
    "MaxMin",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoConvTranspose1d",
    "OrthoConvTranspose2d",
    "OrthoConvTranspose3d",
    "OrthoLinear",
    "UnitNormLinear",
    "constrain",
    "fused",
    "orthogonal",
    "singular_values",
]
