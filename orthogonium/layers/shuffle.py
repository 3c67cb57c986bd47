"""Down- and upsampling that only moves numbers: pixels of a window to channels, and back."""

from collections.abc import Sequence

from torch import Tensor, nn

from orthogonium._checks import as_tuple


class InvertibleDownsampling2d(nn.Module):
    """Each ``factor`` window of pixels becomes channels: a permutation, so distances are kept exactly.

    The layout is that of :class:`torch.nn.PixelUnshuffle`, for windows of any sides.

    Args:
        factor: sides of the window; they must divide the image's.

    Shape:
        ``(batch, channels, height, width)`` to ``(batch, channels · Π factor, height // f₁, width // f₂)``.
    """

    def __init__(self, factor: int | Sequence[int]) -> None:
        super().__init__()
        self.factor = as_tuple("factor", factor, 2, least=1)

    def forward(self, features: Tensor) -> Tensor:
        high, wide = self.factor
        split = features.unflatten(3, (-1, wide)).unflatten(2, (-1, high))  # batch, channels, h, high, w, wide
        return split.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class InvertibleUpsampling2d(nn.Module):
    """The inverse of :class:`InvertibleDownsampling2d`: channels become windows of pixels.

    Args:
        factor: sides of the window; their product must divide the channels.

    Shape:
        ``(batch, channels · Π factor, height, width)`` to ``(batch, channels, height · f₁, width · f₂)``.
    """

    def __init__(self, factor: int | Sequence[int]) -> None:
        super().__init__()
        self.factor = as_tuple("factor", factor, 2, least=1)

    def forward(self, features: Tensor) -> Tensor:
        split = features.unflatten(1, (-1, *self.factor))  # batch, channels, high, wide, h, w
        return split.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
