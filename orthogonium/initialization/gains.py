"""The factor that keeps signals alive through an activation, computed for any activation."""

import math

from orthogonium.initialization._elementwise import ActivationLike, as_elementwise
from orthogonium.initialization.critical import critical_point, warn_if_unstable
from orthogonium.initialization.mean_field import moments

WEIGHTS = ("orthogonal", "gaussian")
CRITERIA = ("critical", "variance", "gradient", "centred", "lipschitz")


def gain(
    activation: ActivationLike,
    weights: str = "orthogonal",
    criterion: str = "critical",
    depth: int | None = None,
) -> float:
    """By what to multiply orthogonal weights, or the ``1 / √fan_in`` of Gaussian ones, before an activation.

    Args:
        activation: a name, a module or a function of one number. Activations that only reorder entries have gain one.
        weights: ``"orthogonal"`` or ``"gaussian"``. Wide layers of both kinds change sizes alike, so this matters
            where the largest singular value does: in ``"lipschitz"`` and ``depth``.
        criterion: what to keep.

            - ``"critical"``: the size of gradients, at the variance where signals settle without biases; what deep
              stacks need.
            - ``"variance"``: activations of second moment one from pre-activations of variance one.
            - ``"gradient"``: the size of gradients at pre-activations of variance one.
            - ``"centred"``: variance one of activations about their mean, for weights whose rows sum to zero.
            - ``"lipschitz"``: no distance grows; with Gaussian weights for large square matrices, whose norm tends to
              two.
        depth: only with ``"critical"`` and orthogonal weights: the gain at which that many layers are nearly an
            isometry, for use with the biases of :func:`criticality`.

    Returns:
        The gain.

    Warns:
        UnstableVarianceWarning: at the critical gain, signals drift away (gelu, silu, mish).

    Raises:
        ValueError: an unknown word, ``depth`` where it means nothing, or no such gain (the message says why).

    Source:
        Schoenholz et al., "Deep information propagation", ICLR 2017; Brock, De and Smith, "Characterizing signal
        propagation to close the performance gap in unnormalized ResNets", ICLR 2021, for centred weights.
    """
    for word, value, known in (("weights", weights, WEIGHTS), ("criterion", criterion, CRITERIA)):
        if value not in known:
            raise ValueError(f"{word} must be one of {', '.join(known)}, got {value!r}")
    if depth is not None and criterion != "critical":
        raise ValueError(f'depth={depth} means nothing for criterion="{criterion}". Use criterion="critical".')
    check_depth(depth, weights)
    phi = as_elementwise(activation)
    if criterion == "critical":
        point = critical_point(phi, depth)
        warn_if_unstable(point)
        return point.sigma_w
    if criterion == "lipschitz":
        kept = (phi.steepest * (2 if weights == "gaussian" else 1)) ** 2
    else:
        here = moments(phi, 1.0)
        kept = {
            "variance": here.second,
            "gradient": here.slope2,
            "centred": max(here.second - here.mean**2, 0.0),
        }[criterion]
    if not kept > 1e-28:
        what = "slope" if criterion in ("gradient", "lipschitz") else "output"
        raise ValueError(f'{phi.name} has no gain for criterion="{criterion}": its {what} does not vary')
    return 1 / math.sqrt(kept)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The critical gain under the signature of ``torch.nn.init.calculate_gain``, for more activations.

    It differs from torch's for tanh (1, not 5/3), sigmoid (10.149264, not 1) and selu (0.690486, not 3/4): with
    torch's, gradients change by a factor of 1.10, 0.24 and 1.002 in every layer. It agrees for linear maps, relu and
    leaky relu.

    Args:
        nonlinearity: the name of a function in ``torch.nn.functional``, or of a linear map.
        param: the negative slope of ``leaky_relu`` (0.01), ``alpha`` of ``elu`` and ``celu``, ``beta`` of
            ``softplus``, ``lambd`` of ``softshrink`` and ``hardshrink``.

    Warns:
        UnstableVarianceWarning: at that gain, signals drift away (gelu, silu, mish).

    Raises:
        ValueError: an unknown name, a ``param`` for an activation without one, or no critical gain.
        TypeError: a ``param`` that is no number.
    """
    if not isinstance(nonlinearity, str):
        raise TypeError(f"nonlinearity must be a name, got {nonlinearity!r}. gain(activation) takes functions.")
    point = critical_point(as_elementwise(nonlinearity, param))
    warn_if_unstable(point)
    return point.sigma_w


def check_depth(depth: int | None, weights: str) -> None:
    """Raise ``ValueError`` where ``depth`` asks Gaussian weights for an isometry."""
    if depth is not None and weights == "gaussian":
        raise ValueError(
            f"depth={depth} asks for an isometry, and {depth} Gaussian layers are none at any gain: the variance of "
            "their squared singular values is at least the depth. Use orthogonal weights, or leave depth out."
        )
