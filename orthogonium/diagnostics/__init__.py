"""What happens to signals inside a model, and why."""

from orthogonium.diagnostics.coordinate_check import Coordinate, CoordinateCheck, coordinate_check
from orthogonium.diagnostics.faults import Fault
from orthogonium.diagnostics.jacobian import JacobianExtremes, jacobian_extremes
from orthogonium.diagnostics.layer_signal import LayerSignal
from orthogonium.diagnostics.layerwise_lr import layerwise_lr
from orthogonium.diagnostics.monitor import SpectralMonitor
from orthogonium.diagnostics.signal_report import SignalReport, signal_report

__all__ = [
    "Coordinate",
    "CoordinateCheck",
    "Fault",
    "JacobianExtremes",
    "LayerSignal",
    "SignalReport",
    "SpectralMonitor",
    "coordinate_check",
    "jacobian_extremes",
    "layerwise_lr",
    "signal_report",
]
