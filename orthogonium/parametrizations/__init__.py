"""Modules for ``torch.nn.utils.parametrize``: what turns a free tensor into a constrained weight."""

from orthogonium.parametrizations.checkpoint_format import checkpoint_code, source_of
from orthogonium.parametrizations.constraint import Constraint
from orthogonium.parametrizations.fusion import FusedConstraints
from orthogonium.parametrizations.kernel import KernelPlan, OrthogonalKernel
from orthogonium.parametrizations.normalizers import BatchedIdentity, BatchedPowerIteration, L2Normalize
from orthogonium.parametrizations.orthogonalizers import (
    BatchedBjorckOrthogonalization,
    BatchedCayleyOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
    BatchedSVDOrthogonalization,
)

__all__ = [
    "BatchedBjorckOrthogonalization",
    "BatchedCayleyOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedIdentity",
    "BatchedPolarOrthogonalization",
    "BatchedPowerIteration",
    "BatchedQROrthogonalization",
    "BatchedSVDOrthogonalization",
    "Constraint",
    "FusedConstraints",
    "KernelPlan",
    "L2Normalize",
    "OrthogonalKernel",
    "checkpoint_code",
    "source_of",
]
