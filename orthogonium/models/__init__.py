from orthogonium.models.mlp import lipschitz_mlp

__all__ = ["lipschitz_mlp"]
