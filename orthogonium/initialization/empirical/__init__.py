"""Scales measured by running the network."""

from orthogonium.initialization.empirical.calibration import calibrate
from orthogonium.initialization.empirical.folding import fold_scales
from orthogonium.initialization.empirical.normed import Normed, get_wrapped_submodules, wrap_all_leaf_modules
from orthogonium.initialization.empirical.report import ModuleScales, ScaleReport
from orthogonium.initialization.empirical.tuning import empirical_init, measure_scales

__all__ = [
    "ModuleScales",
    "Normed",
    "ScaleReport",
    "calibrate",
    "empirical_init",
    "fold_scales",
    "get_wrapped_submodules",
    "measure_scales",
    "wrap_all_leaf_modules",
]
