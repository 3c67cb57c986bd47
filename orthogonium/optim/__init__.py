"""Optimisers that keep plain parameters orthogonal."""

from orthogonium.optim.low_rank import LowRankOrthogonal
from orthogonium.optim.muon import StiefelMuon
from orthogonium.optim.parameter_groups import parameter_groups
from orthogonium.optim.riemannian import RiemannianAdam, RiemannianSGD

__all__ = ["LowRankOrthogonal", "RiemannianAdam", "RiemannianSGD", "StiefelMuon", "parameter_groups"]
