from orthogonium.models.cnn import lipschitz_cnn
from orthogonium.models.mlp import lipschitz_mlp

__all__ = ["lipschitz_cnn", "lipschitz_mlp"]
