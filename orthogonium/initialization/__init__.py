"""Starting values for ordinary layers."""

from orthogonium.initialization.kernels import conv_orthogonal_, delta_orthogonal_

__all__ = ["conv_orthogonal_", "delta_orthogonal_"]
