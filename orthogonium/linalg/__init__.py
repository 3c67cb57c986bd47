"""Functions from tensors to tensors, batched over leading dimensions."""

from orthogonium.linalg._precision import NonFiniteError, in_working_precision
from orthogonium.linalg.bjorck import bjorck, polar_pass_through
from orthogonium.linalg.cholesky import cholesky_orthogonalize
from orthogonium.linalg.diagnostics import condition_number, orthogonality_defect, singular_values, stable_rank
from orthogonium.linalg.exponential import skew_frame
from orthogonium.linalg.kernel_bound import absolute_kernel_norm_bound, kernel_norm_bound
from orthogonium.linalg.kernels import adjoint_kernel, compose_kernels, identity_kernel, multiply_by_projector_taps
from orthogonium.linalg.low_rank import low_rank_factors
from orthogonium.linalg.polar import polar, polar_by_svd
from orthogonium.linalg.power_iteration import power_iteration
from orthogonium.linalg.qr import qr_orthogonalize
from orthogonium.linalg.retractions import (
    cayley_retraction,
    geodesic_retraction,
    low_rank_geodesic_update,
    low_rank_polar_update,
    polar_retraction,
    tangent_projection,
)
from orthogonium.linalg.small_step import polar_after_step
from orthogonium.linalg.soft_polar import soft_polar
from orthogonium.linalg.spectral_bound import spectral_norm_bound

__all__ = [
    "NonFiniteError",
    "absolute_kernel_norm_bound",
    "adjoint_kernel",
    "bjorck",
    "cayley_retraction",
    "cholesky_orthogonalize",
    "compose_kernels",
    "condition_number",
    "geodesic_retraction",
    "identity_kernel",
    "in_working_precision",
    "kernel_norm_bound",
    "low_rank_factors",
    "low_rank_geodesic_update",
    "low_rank_polar_update",
    "multiply_by_projector_taps",
    "orthogonality_defect",
    "polar",
    "polar_after_step",
    "polar_by_svd",
    "polar_pass_through",
    "polar_retraction",
    "power_iteration",
    "qr_orthogonalize",
    "singular_values",
    "skew_frame",
    "soft_polar",
    "spectral_norm_bound",
    "stable_rank",
    "tangent_projection",
]
