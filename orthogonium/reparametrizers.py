"""Interim front door (being replaced)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OrthoParams:
    spectral_normalizer: object = None
    orthogonalizer: object = None


class _Polar(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        tall = w if w.shape[-2] >= w.shape[-1] else w.mT
        lam, v = torch.linalg.eigh(tall.mT @ tall)
        q = tall @ (v * lam.clamp_min(1e-12).rsqrt()) @ v.mT
        return q if w.shape[-2] >= w.shape[-1] else q.mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


DEFAULT_ORTHO_PARAMS = OrthoParams()
CHOLESKY_ORTHO_PARAMS = OrthoParams()
PRESETS = {"default": DEFAULT_ORTHO_PARAMS, "cholesky": CHOLESKY_ORTHO_PARAMS}
