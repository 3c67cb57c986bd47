"""Does an attack written by others break a certificate, and is ours as strong?

    python benchmarks/independent_attacks.py [--images 30] [--steps 40]

Attacks digits with projected gradient descent and Auto-PGD of the Adversarial Robustness Toolbox, in the ℓ2 ball
of the certified radius (0 may succeed) and of more than that (to see that the attack works), beside ours.
"""

import argparse

import numpy as np
import torch
from certificates import trained
from torch import nn

import orthogonium as og
from orthogonium.certification import plain_network


def broken(
    name: str, network: nn.Module, x: torch.Tensor, labels: torch.Tensor, radius: torch.Tensor, steps: int
) -> int:
    """How many inputs the attack takes across a boundary without leaving the ball of each."""
    if name == "orthogonium":
        found = [og.attack(network, x[i : i + 1], labels[i : i + 1], float(radius[i]), steps, 2) for i in range(len(x))]
        return sum(bool(result.success) for result in found)
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    # The toolbox computes in float32, so inputs are scaled back into the ball and judged in float64 below.
    classifier = PyTorchClassifier(network.float(), nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=None)
    count = 0
    for i in range(len(x)):
        eps = float(radius[i])
        options = {"norm": 2, "eps": eps, "eps_step": eps / 8, "max_iter": steps, "verbose": False}
        kind = ProjectedGradientDescentPyTorch if name == "PGD" else AutoProjectedGradientDescent
        point = x[i : i + 1].float().numpy()
        attacked = kind(classifier, **options).generate(point, y=np.array([int(labels[i])]))
        shift = torch.from_numpy(attacked).double() - x[i : i + 1]
        shift = shift * min(1.0, eps / float(shift.norm().clamp_min(1e-300))) * (1 - 1e-12)
        with torch.no_grad():
            count += int(network.double()(x[i : i + 1] + shift).argmax(1) != labels[i])
        network.float()
    network.double()
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, x, labels = trained()
    x = x[: options.images].double()
    certificate = og.certify(model, x)
    network = plain_network(model)
    for factor in (1.0, 1.5, 2.0):
        for name in ("orthogonium", "PGD", "Auto-PGD"):
            taken = broken(name, network, x, certificate.prediction, factor * certificate.radius, options.steps)
            print(f"{factor:g} × the certified radius, {name:12}: {taken} of {len(x)} predictions changed")
