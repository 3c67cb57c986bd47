"""Orthogonal and Lipschitz-bounded layers for PyTorch, with certificates that hold."""

from orthogonium._version import __version__
from orthogonium.certification import attack, certified_accuracy, certify, lipschitz_product
from orthogonium.layers import GroupSort, MaxMin, OrthoLinear, UnitNormLinear, fused, orthogonal
from orthogonium.reparametrizers import (
    BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    CAYLEY_ORTHO_PARAMS,
    CHOLESKY_ORTHO_PARAMS,
    CHOLESKY_STABLE_ORTHO_PARAMS,
    DEFAULT_ORTHO_PARAMS,
    DEFAULT_TEST_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    POLAR_ORTHO_PARAMS,
    PRESETS,
    QR_ORTHO_PARAMS,
    SVD_ORTHO_PARAMS,
    ClassParam,
    OrthoParams,
)

__all__ = [
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "CAYLEY_ORTHO_PARAMS",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "POLAR_ORTHO_PARAMS",
    "PRESETS",
    "QR_ORTHO_PARAMS",
    "SVD_ORTHO_PARAMS",
    "ClassParam",
    "GroupSort",
    "MaxMin",
    "OrthoLinear",
    "OrthoParams",
    "UnitNormLinear",
    "__version__",
    "attack",
    "certified_accuracy",
    "certify",
    "fused",
    "lipschitz_product",
    "orthogonal",
]
