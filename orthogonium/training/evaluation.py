"""What a trained network is worth: accuracy, proved and attacked, over radii."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthogonium.certification import Certificate, attack, certify, plain_network

RADII = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """Fractions of the evaluated set. ``attacked[r]`` survives the attack at radius r; ``certified[r]`` is
    proved to. ``broken`` counts inputs certified at a radius where the attack succeeded: always zero, or
    something is wrong."""

    clean_accuracy: float
    certified: dict[float, float]
    attacked: dict[float, float]
    lipschitz_bound: float
    broken: int
    certificate: Certificate


def evaluate(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    radii: Sequence[float] = RADII,
    *,
    attack_steps: int = 40,
    attack_restarts: int = 1,
    seed: int = 0,
    precision: torch.dtype = torch.float64,
) -> Evaluation:
    """Certify every input, then attack at each radius those that no smaller radius has broken.

    Args:
        model: in evaluation mode, of the kind that :func:`~orthogonium.certification.certify` knows.
        x, labels: ``(N, ...)`` and ``(N,)``.
        radii: ℓ2, finite.
        attack_steps, attack_restarts, seed: of :func:`~orthogonium.certification.attack`, which runs in
            float64 on certified and uncertified inputs alike. With no steps nothing is attacked.
        precision: of the evaluation that certificates speak of, as in :func:`~orthogonium.certification.certify`.

    Raises:
        ValueError: a radius that is negative, NaN or infinite; and all errors of ``certify``.
    """
    for radius in radii:
        if not 0 <= radius < math.inf:
            raise ValueError(f"radii must be finite and at least 0, got {radius}")
    labels = labels.cpu()
    certificate = certify(model, x, labels, precision=precision)
    right = certificate.prediction == labels
    certified, attacked, broken = {}, {}, 0
    network = plain_network(model)
    inputs = x.detach().cpu().double()
    standing = right.clone()
    for radius in sorted(radii):
        proved = right & (certificate.radius >= radius)
        certified[radius] = _share(proved)
        if attack_steps > 0:
            left = standing.nonzero().flatten()
            result = attack(
                network,
                inputs[left],
                labels[left],
                radius,
                steps=attack_steps,
                restarts=attack_restarts,
                seed=seed,
            )
            standing[left[result.success]] = False
            attacked[radius] = _share(standing)
            broken += int((proved & ~standing).sum())
    return Evaluation(_share(right), certified, attacked, certificate.lipschitz, broken, certificate)


def certified_curve(certificate: Certificate, labels: Tensor, radii: Tensor) -> Tensor:
    """The share right and certified at each of ``radii``: ``(len(radii),)``."""
    right = certificate.prediction == labels.cpu()
    return (right[:, None] & (certificate.radius[:, None] >= radii.double())).double().mean(0)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else 0.0
