"""Whole models: convert an ordinary one, export a constrained one."""

from orthogonium.surgery.convert import convert
from orthogonium.surgery.export import export
from orthogonium.surgery.report import Change, ConversionReport
from orthogonium.surgery.swaps import LIPSCHITZ_SWAPS

__all__ = ["LIPSCHITZ_SWAPS", "Change", "ConversionReport", "convert", "export"]
