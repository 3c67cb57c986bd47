"""Singular values of every linear layer of a network."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthogonium.linalg.diagnostics import orthogonality_defect, singular_values


@dataclass(frozen=True)
class LayerSpectrum:
    """``singular_values`` descending, float64; ``defect`` is ‖I − QQᵀ‖₂ on the shorter side."""

    path: str
    shape: tuple[int, int]
    singular_values: Tensor
    defect: float


def layer_spectra(model: nn.Module) -> list[LayerSpectrum]:
    """One entry per linear layer, in order; each weight is read once, in the model's current mode."""
    spectra = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                weight = module.weight.detach().cpu()
            rows, columns = weight.shape
            spectra.append(
                LayerSpectrum(path, (rows, columns), singular_values(weight), float(orthogonality_defect(weight)))
            )
    return spectra
