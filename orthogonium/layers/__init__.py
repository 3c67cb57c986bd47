"""Layers with a bound on their Lipschitz constant."""

from orthogonium.layers.activations import GroupSort, MaxMin
from orthogonium.layers.almost_orthogonal import (
    AOLConv1d,
    AOLConv2d,
    AOLConv3d,
    AOLConvTranspose1d,
    AOLConvTranspose2d,
    AOLConvTranspose3d,
)
from orthogonium.layers.constrain import constrain, fused, orthogonal
from orthogonium.layers.conv import AdaptiveOrthoConv2d, OrthoConv1d, OrthoConv2d, OrthoConv3d
from orthogonium.layers.conv_transposed import (
    AdaptiveOrthoConvTranspose2d,
    OrthoConvTranspose1d,
    OrthoConvTranspose2d,
    OrthoConvTranspose3d,
)
from orthogonium.layers.linear import OrthoLinear, UnitNormLinear
from orthogonium.layers.normalization import BatchCentering, LayerCentering, LipschitzBatchNorm
from orthogonium.layers.pooling import (
    L2NormPool1d,
    L2NormPool2d,
    L2NormPool3d,
    ScaledAvgPool1d,
    ScaledAvgPool2d,
    ScaledAvgPool3d,
)
from orthogonium.layers.recurrent import OrthoGRU, OrthoLSTM, OrthoRNN
from orthogonium.layers.residual import ConvexResidual, SLLConv1d, SLLConv2d, SLLConv3d, SLLLinear
from orthogonium.layers.shuffle import InvertibleDownsampling2d, InvertibleUpsampling2d
from orthogonium.layers.skew_conv import SkewOrthoConv1d, SkewOrthoConv2d, SkewOrthoConv3d
from orthogonium.layers.spectrum import singular_values

__all__ = [
    "AOLConv1d",
    "AOLConv2d",
    "AOLConv3d",
    "AOLConvTranspose1d",
    "AOLConvTranspose2d",
    "AOLConvTranspose3d",
    "AdaptiveOrthoConv2d",
    "AdaptiveOrthoConvTranspose2d",
    "BatchCentering",
    "ConvexResidual",
    "GroupSort",
    "InvertibleDownsampling2d",
    "InvertibleUpsampling2d",
    "L2NormPool1d",
    "L2NormPool2d",
    "L2NormPool3d",
    "LayerCentering",
    "LipschitzBatchNorm",
    "MaxMin",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoConvTranspose1d",
    "OrthoConvTranspose2d",
    "OrthoConvTranspose3d",
    "OrthoGRU",
    "OrthoLSTM",
    "OrthoLinear",
    "OrthoRNN",
    "SLLConv1d",
    "SLLConv2d",
    "SLLConv3d",
    "SLLLinear",
    "ScaledAvgPool1d",
    "ScaledAvgPool2d",
    "ScaledAvgPool3d",
    "SkewOrthoConv1d",
    "SkewOrthoConv2d",
    "SkewOrthoConv3d",
    "UnitNormLinear",
    "constrain",
    "fused",
    "orthogonal",
    "singular_values",
]
