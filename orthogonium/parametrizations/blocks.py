"""A weight made of stacked blocks, each of them orthogonal: the gates of a recurrent layer, the heads of attention."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from orthogonium._checks import check_same_shape


@dataclass(frozen=True)
class BlockPlan:
    """How a ``(blocks · rows, columns)`` weight falls into matrices.

    A matrix with orthonormal columns as a whole has blocks that contract: four stacked gates of an LSTM would each
    halve a vector on average. So each block is orthogonal on its own.

    Args:
        blocks: how many.
        rows, columns: of one block.
    """

    blocks: int
    rows: int
    columns: int

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.blocks * self.rows, self.columns

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.rows, self.columns


class StackedBlocks(nn.Module):
    """A free tensor ``(blocks, rows, columns)`` to a weight ``(blocks · rows, columns)`` of orthogonal blocks.

    All blocks are orthogonalised in one batched call.

    Args:
        plan: the shapes.
        matrix_hook: orthogonaliser for ``plan.matrix_shape``.
    """

    def __init__(self, plan: BlockPlan, matrix_hook: nn.Module) -> None:
        super().__init__()
        self.plan, self.matrix_hook = plan, matrix_hook

    @property
    def scale_invariant(self) -> bool:
        return bool(getattr(self.matrix_hook, "scale_invariant", False))

    def forward(self, free: Tensor) -> Tensor:
        weight: Tensor = self.matrix_hook(free)
        return weight.flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The free tensor of the blocks nearest to those of ``weight``; ``ValueError`` for another shape."""
        check_same_shape("weight", weight, self.plan.weight_shape)
        stacked = weight.unflatten(0, (self.plan.blocks, self.plan.rows))
        inverse: Any = getattr(self.matrix_hook, "right_inverse", None)
        free: Tensor = stacked if inverse is None else inverse(stacked)
        return free

    def extra_repr(self) -> str:
        return f"{self.plan.blocks} blocks of {self.plan.rows} × {self.plan.columns}"
