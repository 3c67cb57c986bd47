"""A Lipschitz constant of a whole network: the product over its layers."""

from dataclasses import dataclass

from torch import nn

from orthogonium.certification.sequential import product, read_sequential


@dataclass(frozen=True)
class LayerBound:
    """An upper bound on the Lipschitz constant of one layer."""

    path: str
    kind: str
    bound: float


@dataclass(frozen=True)
class LipschitzProduct:
    """An upper bound on the ℓ2 Lipschitz constant of a network, and the factors that make it up."""

    bound: float
    layers: tuple[LayerBound, ...]


def lipschitz_product(model: nn.Module) -> LipschitzProduct:
    """Bound ``‖f(x) − f(y)‖₂ / ‖x − y‖₂`` over all inputs by the product of the layers' bounds.

    Composing maps multiplies their constants, so the product is never below the truth; between
    orthogonal layers it is often the truth. The norm of each weight is a verified upper bound, rounding
    included, and the product is rounded up.

    Args:
        model: a :class:`torch.nn.Sequential` in evaluation mode, of the modules that
            :func:`~orthogonium.certification.sequential.read_sequential` knows.

    Raises:
        TypeError: a module is not known; the message names its path.
        ValueError: the model is in training mode, or a weight is not finite.

    Source:
        Szegedy et al., "Intriguing properties of neural networks", ICLR 2014, section 4.3.
    """
    links = read_sequential(model)
    return LipschitzProduct(product(links), tuple(LayerBound(k.path, k.kind, k.norm) for k in links))
