"""Interim (being replaced)."""

from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams, _Polar


class OrthoLinear(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS, *, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        nn.init.orthogonal_(self.weight)
        register_parametrization(self, "weight", _Polar())


class UnitNormLinear(nn.Linear):
    pass
