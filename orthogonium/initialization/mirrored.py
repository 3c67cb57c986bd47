"""Weights under which a network of rectifiers starts as an exact isometry: every feature comes with its negative."""

import torch
from torch import Tensor
from torch.nn import init

from orthogonium._checks import check_floating
from orthogonium.initialization._elementwise import Elementwise
from orthogonium.initialization.kernels import delta_orthogonal_
from orthogonium.linalg._precision import working_dtype

POSITIONS = ("first", "hidden", "last")


def looks_linear_(
    tensor: Tensor, position: str = "hidden", gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a weight, in place, with mirrored blocks ``[[A, −A], [−A, A]]`` of one orthogonal matrix times ``gain``.

    Features come as ``(u, −u)``, and ``relu(u) − relu(−u) = u``, so the next layer computes ``(A u, −A u)`` as if there
    were no activation: the network starts linear and, with square layers, all singular values of its Jacobian are one.
    The same holds for every activation with ``φ(u) − φ(−u) = c u``: leaky relu (c = 1 + slope), gelu, silu and softplus
    (c = 1); use ``gain=1 / c`` behind those.

    Args:
        tensor: ``(out, in)`` of a linear layer, or ``(out, in, *k)`` of a convolution, which is delta-orthogonal.
        position: ``"first"`` makes mirrored features of plain ones, ``[A; −A]``; ``"last"`` takes them together,
            ``[A, −A]``; ``"hidden"`` does both.
        gain: the common singular value of ``A``.
        generator: for reproducible draws, on the tensor's device.

    Returns:
        ``tensor``.

    Raises:
        ValueError: an unknown position, a mirrored side that is odd, or no weight.
        TypeError: not real floating point.

    Source: Balduzzi et al., "The shattered gradients problem: if resnets are the answer, then what is the question?",
        ICML 2017.
    """
    check_floating("tensor", tensor)
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
    if tensor.ndim not in (2, 3, 4, 5) or tensor.numel() == 0:
        raise ValueError(f"tensor must be (out, in) or (out, in, *k) and not empty, got {tuple(tensor.shape)}")
    mirrored = ([0] if position != "last" else []) + ([1] if position != "first" else [])
    for axis in mirrored:
        if tensor.shape[axis] % 2:
            raise ValueError(
                f"position={position!r} pairs the {('outputs', 'inputs')[axis]} of a weight of shape "
                f"{tuple(tensor.shape)}, and {tensor.shape[axis]} is odd. Use an even number of features."
            )
    halves = [tensor.shape[axis] // (2 if axis in mirrored else 1) for axis in (0, 1)]
    if tensor.is_meta:
        return tensor
    work = working_dtype(tensor.dtype)
    block = tensor.new_empty((*halves, *tensor.shape[2:]), dtype=work)
    if tensor.ndim == 2:
        init.orthogonal_(block, gain=gain, generator=generator)
    else:
        delta_orthogonal_(block, gain=gain, generator=generator)
    for axis in mirrored:
        block = torch.cat((block, -block), axis)
    with torch.no_grad():
        tensor.copy_(block)
    return tensor


def odd_slope(phi: Elementwise) -> float:
    """``c`` in ``φ(u) − φ(−u) = c u``.

    Raises:
        ValueError: that difference is not linear, so mirrored features do not cancel the activation.
    """
    x = torch.linspace(0.05, 6, 120, dtype=torch.float64, device="cpu")
    ratio = (phi.value(x) - phi.value(-x)) / x
    c = float(ratio.mean())
    if not bool(((ratio - c).abs() < 1e-7 * (1 + abs(c))).all()) or abs(c) < 1e-7:
        raise ValueError(
            f"{phi.name}(u) − {phi.name}(−u) is not linear, so mirrored features do not cancel it. "
            "It is for relu, leaky_relu, gelu, silu and softplus."
        )
    return c
