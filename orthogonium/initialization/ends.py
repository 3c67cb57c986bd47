"""Scale signals where a network begins and where its head reads them."""

from collections import OrderedDict

from torch import Tensor, nn

from orthogonium.initialization.whole_model import Initialization


class Scale(nn.Module):
    """Multiply by a fixed number.

    Args:
        factor: the number.

    Shape:
        any, and the same after.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * features

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


def with_scaled_ends(model: nn.Sequential, report: Initialization) -> nn.Sequential:
    """Scale unit inputs down to where ``report`` holds signals, and features up again before the last weighted layer.

    Nearly linear operation, which lets a thousand layers train, needs small signals; a head needs ordinary ones.

    Args:
        model: the modules, initialised with ``depth``. They are shared with the result, their names in it are kept.
        report: of that initialisation.

    Returns:
        A new ``nn.Sequential`` with two :class:`Scale` modules, ``input_scale`` and ``head_scale``.

    Raises:
        TypeError: ``model`` is no ``nn.Sequential``; put :class:`Scale` modules in your ``forward`` then.
        ValueError: fewer than two of its entries have weights.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"model must be an nn.Sequential, got {type(model).__name__}. Multiply inputs by report.input_scale and "
            "features before the head by its inverse in your forward."
        )
    entries = list(model.named_children())
    weighted = [i for i, (_, module) in enumerate(entries) if any(p.ndim > 1 for p in module.parameters())]
    if len(weighted) < 2:
        raise ValueError(f"model has {len(weighted)} entries with weights, and scaling needs a body and a head")
    entries.insert(weighted[-1], ("head_scale", Scale(1 / report.input_scale)))
    entries.insert(weighted[0], ("input_scale", Scale(report.input_scale)))
    return nn.Sequential(OrderedDict(entries))
