"""Modules for ``torch.nn.utils.parametrize``: what turns a free tensor into a constrained weight."""

from orthogonium.parametrizations.almost_orthogonal import AlmostOrthogonalKernel
from orthogonium.parametrizations.blocks import BlockPlan, StackedBlocks
from orthogonium.parametrizations.checkpoint_format import checkpoint_code, source_of
from orthogonium.parametrizations.constraint import Constraint
from orthogonium.parametrizations.fusion import FusedConstraints
from orthogonium.parametrizations.kernel import KernelPlan, OrthogonalKernel, draw_parts
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
    "AlmostOrthogonalKernel",
    "BatchedBjorckOrthogonalization",
    "BatchedCayleyOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedIdentity",
    "BatchedPolarOrthogonalization",
    "BatchedPowerIteration",
    "BatchedQROrthogonalization",
    "BatchedSVDOrthogonalization",
    "BlockPlan",
    "Constraint",
    "FusedConstraints",
    "KernelPlan",
    "L2Normalize",
    "OrthogonalKernel",
    "StackedBlocks",
    "checkpoint_code",
    "draw_parts",
    "source_of",
]
