"""A fully connected network that never grows a distance."""

import itertools

import torch
from torch import nn

from orthogonium.layers import MaxMin, OrthoLinear
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams


def lipschitz_mlp(
    in_features: int,
    out_features: int,
    width: int = 128,
    depth: int = 4,
    ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Flatten, then ``depth`` orthogonal linear layers with :class:`MaxMin` between them: 1-Lipschitz for ℓ2.

    Every layer up to the last also keeps the norm of gradients where it does not reduce the number of
    features, so depth costs no signal.

    Args:
        in_features: numbers per input, after flattening.
        out_features: logits.
        width: features between layers, even.
        depth: number of linear layers, at least 1.
        ortho_params: how each free matrix becomes an orthogonal one.
        device, dtype: as in :class:`torch.nn.Linear`.

    Shape:
        ``(N, ...)`` with ``in_features`` numbers per input, to ``(N, out_features)``.

    Raises:
        ValueError: a size is below 1, or ``width`` is odd.

    Source:
        Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """
    sizes = {"in_features": in_features, "out_features": out_features, "width": width, "depth": depth}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % 2:
        raise ValueError(f"width must be even, as MaxMin pairs features, got {width}. Use {width + 1}")
    features = [in_features, *[width] * (depth - 1), out_features]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(features):
        layers += [
            OrthoLinear(before, after, ortho_params=ortho_params, device=device, dtype=dtype),
            MaxMin(),
        ]
    return nn.Sequential(*layers[:-1])
