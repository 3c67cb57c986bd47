"""Functions that look at numbers to choose their path, made safe for tracers and the meta device."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from orthogonium._version import __version__
from orthogonium.linalg._precision import without_autocast

# CUDA graphs, as of torch.compile(mode="reduce-overhead"), replay kernels without the decisions that chose them. An
# operator that decides on the host stays outside of them, in the versions of torch that can be told so.
DECIDES_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def opaque(
    fake: Callable[..., Any], by_columns: Callable[..., tuple[int, ...]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the function itself in eager mode, and as one custom operator while PyTorch traces.

    The functions below decide on the host ("is this matrix nearly orthogonal already?"), which a
    tracer cannot follow. As a ``torch.library`` operator they stay a single node of the graph, so that
    ``torch.compile(fullgraph=True)`` and ``torch.export`` keep the fast adaptive code. Eager calls skip
    the operator and its dispatch cost; tensors on the meta device only get their shapes.

    Args:
        fake: takes the same arguments, returns empty tensors of the shapes that the function returns.
        by_columns: takes the same arguments, says which of several results lie by columns, as LAPACK leaves them, where
            the operator returns them. The others are row-major.
    """

    def arranged(result: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(result, Tensor):
            return result.contiguous()
        columns = () if by_columns is None else by_columns(*args)
        return tuple(
            part.mT.contiguous().mT if number in columns else part.contiguous() for number, part in enumerate(result)
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def arranging(*args: Any) -> Any:
            with without_autocast(args[0]):  # which the compiled code around has not looked at
                return arranged(function(*args), args)

        # version and layout in the name keep compiled graphs that outlive an upgrade from meeting another operator
        layout = "" if by_columns is None else "_by_columns"
        name = f"orthogonium_{__version__.replace('.', '_')}::{function.__name__.lstrip('_')}{layout}"
        tags: dict[str, Any] = {"tags": DECIDES_ON_THE_HOST} if DECIDES_ON_THE_HOST else {}
        operator = torch.library.custom_op(name, arranging, mutates_args=(), **tags)
        operator.register_fake(lambda *args: arranged(fake(*args), args))

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return operator(*args)
            if args[0].is_meta:
                return fake(*args)
            return function(*args)

        return call

    return decorate
