"""Starting values for ordinary layers."""

from orthogonium.initialization.empirical import (
    ModuleScales,
    Normed,
    ScaleReport,
    calibrate,
    empirical_init,
    fold_scales,
    get_wrapped_submodules,
    measure_scales,
    wrap_all_leaf_modules,
)
from orthogonium.initialization.kernels import conv_orthogonal_, delta_orthogonal_

__all__ = [
    "ModuleScales",
    "Normed",
    "ScaleReport",
    "calibrate",
    "conv_orthogonal_",
    "delta_orthogonal_",
    "empirical_init",
    "fold_scales",
    "get_wrapped_submodules",
    "measure_scales",
    "wrap_all_leaf_modules",
]
