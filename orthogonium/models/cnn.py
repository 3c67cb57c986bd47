"""A convolutional network that never grows a distance."""

import math

import torch
from torch import nn

from orthogonium.layers import MaxMin, OrthoConv2d, OrthoLinear
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams


def check_cnn_sizes(width: int, depth: int) -> None:
    """Raise ``ValueError`` unless :func:`lipschitz_cnn` can have this width and depth."""
    if width % 32 or width < 32:
        raise ValueError(f"width must be a multiple of 32, got {width}. Use {max(32, width // 32 * 32)}")
    if depth < 4:
        raise ValueError(f"depth must be at least 4 (two convolutions, two linear layers), got {depth}")


def lipschitz_cnn(
    in_features: int,
    out_features: int,
    width: int = 256,
    depth: int = 4,
    ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Orthogonal convolutions on square one-channel images, then two orthogonal linear layers: 1-Lipschitz for ℓ2.

    A 3×3 convolution to ``c = width / 16`` channels, another with stride two to ``4 c``, which loses nothing, ``depth
    − 4`` more between ``4 c`` channels, and linear layers to ``width`` features and to the logits, with
    :class:`MaxMin` in between.

    Args:
        in_features: pixels, a square of an even side.
        out_features: logits.
        width: a multiple of 32: features before the last layer.
        depth: number of layers with weights, at least 4.
        ortho_params: how each free matrix becomes an orthogonal one.
        device, dtype: as in :class:`torch.nn.Conv2d`.

    Shape:
        ``(N, ...)`` with ``in_features`` numbers per input, to ``(N, out_features)``.

    Raises:
        ValueError: another ``in_features``, ``width`` or ``depth``.
    """
    side = math.isqrt(max(in_features, 0))
    if side * side != in_features or side % 2 or side == 0:
        raise ValueError(f"in_features must be the square of an even side, got {in_features}")
    check_cnn_sizes(width, depth)
    shared = {"ortho_params": ortho_params, "device": device, "dtype": dtype}
    channels = width // 16
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (1, side, side))]
    layers += [OrthoConv2d(1, channels, 3, **shared), MaxMin()]  # type: ignore[arg-type]
    layers += [OrthoConv2d(channels, 4 * channels, 3, stride=2, **shared), MaxMin()]  # type: ignore[arg-type]
    for _ in range(depth - 4):
        layers += [OrthoConv2d(4 * channels, 4 * channels, 3, **shared), MaxMin()]  # type: ignore[arg-type]
    features = channels * in_features
    layers += [nn.Flatten(), OrthoLinear(features, width, **shared), MaxMin()]  # type: ignore[arg-type]
    layers += [OrthoLinear(width, out_features, **shared)]  # type: ignore[arg-type]
    return nn.Sequential(*layers)
