"""Whole models: convert an ordinary one, export a constrained one, project weights and keep them projected."""

from orthogonium.surgery.convert import convert
from orthogonium.surgery.export import export
from orthogonium.surgery.keep import KeptOrthogonal, keep_orthogonal
from orthogonium.surgery.projection import ProjectionReport, orthogonalize_model
from orthogonium.surgery.report import Change, ConversionReport
from orthogonium.surgery.swaps import LIPSCHITZ_SWAPS

__all__ = [
    "LIPSCHITZ_SWAPS",
    "Change",
    "ConversionReport",
    "KeptOrthogonal",
    "ProjectionReport",
    "convert",
    "export",
    "keep_orthogonal",
    "orthogonalize_model",
]
