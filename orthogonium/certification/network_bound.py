"""A Lipschitz constant of a whole network, from the constants of its parts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from orthogonium._reports import aligned
from orthogonium.certification.faithful import check_same_results
from orthogonium.certification.network import Network, analyse


@dataclass(frozen=True)
class LayerBound:
    """One call in the network.

    Attributes:
        path: of the module that is called, or that makes the call; empty for the model itself.
        kind: the type of the module, or the name of the function.
        constant: an upper bound on the Lipschitz constant of the call, as a function of all its inputs.
        bound: the same for the whole network up to its result.
    """

    path: str
    kind: str
    constant: float
    bound: float


@dataclass(frozen=True)
class NetworkBound:
    """An upper bound on the ℓ2 Lipschitz constant of a network, and what it is made of, in the order of computation."""

    bound: float
    layers: tuple[LayerBound, ...]

    def table(self) -> str:
        """One line per call: path, what it is, its own constant, and the bound up to there."""
        rows = [("layer", "what", "constant", "bound so far")]
        rows += [(r.path or "(model)", r.kind, f"{r.constant:.9g}", f"{r.bound:.9g}") for r in self.layers]
        return aligned(rows, right=(2, 3), rule=True)

    def __str__(self) -> str:
        return f"{self.table()}\nLipschitz bound of the network: {self.bound:.9g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; ``layers`` is a list of dictionaries."""
        return {"bound": self.bound, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self, indent: int | None = 2) -> str:
        """The same as text; numbers read back exactly."""
        return json.dumps(self.to_dict(), indent=indent)


def lipschitz_bound(model: nn.Module, input_shape: Sequence[int] | None = None) -> NetworkBound:
    """Bound ``‖f(x) − f(y)‖₂ / ‖x − y‖₂`` over all inputs, by one rule per layer and function.

    The model is traced in evaluation mode: layers of this library and of torch are taken whole, other modules looked
    into. Composition multiplies constants, sums add them, and joined tensors add their squares. Each constant is
    rounded up, and the norm of each weight is a verified upper bound, so the result is never below the truth. Between
    orthogonal layers it is often the truth.

    What is not known is refused by its path rather than guessed; :func:`~orthogonium.certification.lipschitz_rule`
    teaches it.

    Args:
        model: in evaluation mode; maps one tensor ``(N, ...)`` to one tensor, samples apart.
        input_shape: of one input, without the batch. Needed where a constant depends on sizes: sums of branches, means,
            adaptive pooling; and it makes some bounds smaller, as of a convolution with zero padding.

    Raises:
        TypeError: a module or function is not known, has no constant, or has hooks; the model branches on the values of
            its input, or does not return one tensor.
        ValueError: the model is in training mode, holds NaN, infinite or complex weights, or does not take this shape.

    Source:
        Szegedy et al., "Intriguing properties of neural networks", ICLR 2014, section 4.3, for the product;
        docs/certificates.md for the rest.
    """
    network = analyse(model, input_shape)
    check_same_results(model, network, input_shape)
    return bound_of(network)


def bound_of(network: Network) -> NetworkBound:
    """The bound of a network that is traced already."""
    steps = [step for step in network.steps.values() if step.inputs]
    return NetworkBound(network.bound, tuple(LayerBound(s.path, s.kind, s.constant, s.bound) for s in steps))
