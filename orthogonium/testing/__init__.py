"""A test kit for layers with promises: assertions on the operator itself, and strategies for hypothesis."""

from orthogonium.testing.assertions import assert_lipschitz, assert_orthogonal, materialise
from orthogonium.testing.strategies import kernels, layers, matrices

__all__ = ["assert_lipschitz", "assert_orthogonal", "kernels", "layers", "materialise", "matrices"]
