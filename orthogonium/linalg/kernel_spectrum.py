"""Singular values of a convolution as an operator on images: by frequency on a circle, by Lanczos anywhere else."""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor


def circular_singular_values(
    kernel: Tensor, sides: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int = 1
) -> Tensor:
    """Every singular value of a circular convolution whose stride divides the image sides: exact, in float64.

    Fourier's transform turns the operator into one block per frequency of the output; the input frequencies that a
    stride folds onto it stand side by side, divided by ``√Π s``.

    Args:
        kernel: ``(out, in / groups, *k)``.
        sides: of the image; multiples of ``stride``.
        stride, dilation: per axis.
        groups: of channels; their spectra are joined.

    Returns:
        Descending; ``Π(sides / stride) · min(out, in · Π stride)`` of them.

    Raises:
        ValueError: a stride that does not divide its side.

    Source: Sedghi, Gupta and Long, "The singular values of convolutional layers", ICLR 2019, for stride one.
    """
    if any(n % s for n, s in zip(sides, stride, strict=True)):
        raise ValueError(f"the stride {tuple(stride)} must divide the image sides {tuple(sides)}")
    dims = len(sides)
    kernel = kernel.detach().double()
    wrapped = kernel.new_zeros((*kernel.shape[:2], prod(sides)))
    places = torch.zeros((1,) * dims, dtype=torch.long, device=kernel.device)
    for axis, (k, n, d) in enumerate(zip(kernel.shape[2:], sides, dilation, strict=True)):
        steps = torch.arange(k, device=kernel.device) * d % n
        places = places * n + steps.view([-1 if i == axis else 1 for i in range(dims)])
    wrapped.index_add_(2, places.flatten(), kernel.flatten(2))
    symbol = torch.fft.fftn(wrapped.unflatten(2, tuple(sides)), dim=tuple(range(2, dims + 2)))
    folded = torch.stack(
        [symbol[(..., *map(_block, corner, sides, stride))] for corner in product(*map(range, stride))], 2
    )
    blocks = folded.unflatten(0, (groups, -1)).flatten(4).permute(0, 4, 1, 2, 3).flatten(3)
    values = torch.linalg.svdvals(blocks / prod(stride) ** 0.5)
    return values.flatten().sort(descending=True).values


def _block(corner: int, side: int, stride: int) -> slice:
    return slice(corner * (side // stride), (corner + 1) * (side // stride))


def largest_singular_values(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    steps: int,
) -> Tensor:
    """The ``count`` largest singular values of a linear map by Lanczos with full reorthogonalisation, from below.

    Args:
        apply, adjoint: the map and its adjoint.
        start: a vector of the map's domain, any shape.
        count: how many values.
        steps: of the iteration; the Krylov space's dimension.

    Returns:
        Descending; fewer than ``count`` if the Krylov space ends early. A multiple singular value is found once.
    """
    basis = [start.flatten() / torch.linalg.vector_norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, start.numel())):
        image = adjoint(apply(basis[-1].view_as(start))).flatten()
        diagonal.append(float(image @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            image = image - known.T @ (known @ image)
        length = float(torch.linalg.vector_norm(image))
        if length <= 1e-13 * max(diagonal):
            break
        beside.append(length)
        basis.append(image / length)
    size = len(diagonal)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: size - 1], dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix + torch.diag(off, 1) + torch.diag(off, -1))
    return values.clamp_min(0).sqrt().flip(0)[:count]
