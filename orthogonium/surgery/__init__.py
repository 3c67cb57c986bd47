"""Whole models: project them, and keep them projected."""

from orthogonium.surgery.keep import KeptOrthogonal, keep_orthogonal
from orthogonium.surgery.projection import ProjectionReport, orthogonalize_model

__all__ = ["KeptOrthogonal", "ProjectionReport", "keep_orthogonal", "orthogonalize_model"]
