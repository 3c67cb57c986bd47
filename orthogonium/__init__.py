"""Orthogonal and Lipschitz-bounded layers for PyTorch, with certificates that hold."""

from orthogonium._version import __version__
from orthogonium.layers import OrthoLinear, UnitNormLinear

__all__ = ["OrthoLinear", "UnitNormLinear", "__version__"]
