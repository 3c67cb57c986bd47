"""What a report says of one call of one layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSignal:
    """One call of one layer. ``None`` stands where a quantity does not exist or was not asked for.

    Attributes:
        name: as in ``model.named_modules()``, with the number of the call from the second on.
        kind: its class.
        activation_rms, activation_mean: over all entries of the (first) output.
        gradient_rms, gradient_mean: of the loss with respect to that output.
        gain: how much differences between inputs of the batch grow: spread of the output over spread of the input, as
            root mean squares of the distance from the batch's mean.
        dead: share of channels (features) that are zero for every input of the batch.
        saturated: for tanh, sigmoid and their like, share of entries where the slope is below a tenth of the steepest.
        correlation: mean cosine between the outputs for two inputs; near one, the layer cannot tell them apart.
        update_ratio: learning rate times norm of the gradient over norm of the weights.
        sigma_max, sigma_min: extreme singular values of the layer's own Jacobian at the first input.
        sigma_is_exact: otherwise ``sigma_min`` is only an upper bound.
    """

    name: str
    kind: str
    activation_rms: float
    activation_mean: float
    gradient_rms: float | None
    gradient_mean: float | None
    gain: float | None
    dead: float
    saturated: float | None
    correlation: float | None
    update_ratio: float | None
    sigma_max: float | None
    sigma_min: float | None
    sigma_is_exact: bool | None
