"""Starting values for ordinary layers, and the theory that chooses them."""

from orthogonium.initialization.critical import (
    ISOMETRY_SPREAD,
    FixedPoint,
    UnstableVarianceWarning,
    criticality,
    fixed_point,
)
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
from orthogonium.initialization.ends import Scale, with_scaled_ends
from orthogonium.initialization.gains import calculate_gain, gain
from orthogonium.initialization.kernels import conv_orthogonal_, delta_orthogonal_
from orthogonium.initialization.mean_field import SignalTheory, signal_through_depth
from orthogonium.initialization.mirrored import looks_linear_
from orthogonium.initialization.whole_model import Initialization, LayerStart, initialize

__all__ = [
    "ISOMETRY_SPREAD",
    "FixedPoint",
    "Initialization",
    "LayerStart",
    "ModuleScales",
    "Normed",
    "Scale",
    "ScaleReport",
    "SignalTheory",
    "UnstableVarianceWarning",
    "calculate_gain",
    "calibrate",
    "conv_orthogonal_",
    "criticality",
    "delta_orthogonal_",
    "empirical_init",
    "fixed_point",
    "fold_scales",
    "gain",
    "get_wrapped_submodules",
    "initialize",
    "looks_linear_",
    "measure_scales",
    "signal_through_depth",
    "with_scaled_ends",
    "wrap_all_leaf_modules",
]
