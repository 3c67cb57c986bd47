"""Whole models: convert an ordinary one, export a constrained one."""

from orthogonium.surgery.convert import convert
from orthogonium.surgery.export import export
from orthogonium.surgery.report import Change, ConversionReport

__all__ = ["Change", "ConversionReport", "convert", "export"]
