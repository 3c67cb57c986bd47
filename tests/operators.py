"""The matrix of a convolution layer, in float64, from its response to every impulse."""

import torch
from torch import Tensor, nn


def materialise(layer: nn.Module, sides: tuple[int, ...]) -> Tensor:
    """``(outputs, inputs)``; refuses the image sides that the layer's call refuses."""
    shape = (layer.in_channels, *sides)
    with torch.no_grad():
        layer(torch.zeros(1, *shape, dtype=layer.weight.dtype))
        impulses = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
        weight = layer.weight.detach().double()
        if layer.transposed:
            response = layer._transposed_forward(impulses, weight, None, tuple(layer.output_padding))
        else:
            response = layer._conv_forward(impulses, weight, None)
    return response.flatten(1).T


def spectrum(matrix: Tensor) -> Tensor:
    """Singular values, ascending, by the eigenvalues of the smaller Gram matrix: good to 1e-15 around one."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(short @ short.T).clamp_min(0).sqrt()


def allowance(matrix: Tensor, dtype: torch.dtype, groups: int = 1) -> float:
    """``8 √n eps`` with ``n`` the operator's longer side over groups."""
    return 8 * (max(matrix.shape) / groups) ** 0.5 * torch.finfo(dtype).eps


def explicit(weight: Tensor, sides, stride, dilation, pads, circular, groups) -> Tensor:
    """The same matrix by the definition, entry by entry: ``y[p] = Σ_t W[t] x[s p + d t − before]``."""
    weight = weight.detach().double()
    dims, (out, inner) = len(sides), weight.shape[:2]
    windows = [
        (n + sum(pad) - d * (k - 1) - 1) // s + 1
        for n, pad, d, k, s in zip(sides, pads, dilation, weight.shape[2:], stride, strict=True)
    ]
    matrix = torch.zeros(out, *windows, inner * groups, *sides, dtype=torch.float64)
    for p in torch.cartesian_prod(*map(torch.arange, windows)).view(-1, dims).tolist():
        for t in torch.cartesian_prod(*map(torch.arange, weight.shape[2:])).view(-1, dims).tolist():
            q = [s * i + d * j - pad[0] for s, i, d, j, pad in zip(stride, p, dilation, t, pads, strict=True)]
            if circular:
                q = [i % n for i, n in zip(q, sides, strict=True)]
            elif any(not 0 <= i < n for i, n in zip(q, sides, strict=True)):
                continue
            for o in range(out):
                first = o // (out // groups) * inner
                matrix[(o, *p, slice(first, first + inner), *q)] += weight[(o, slice(None), *t)]
    return matrix.flatten(0, dims).flatten(1)
