"""Functions that look at numbers to choose their path, made safe for tracers and the meta device."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from orthogonium._version import __version__

# CUDA graphs, as of torch.compile(mode="reduce-overhead"), replay kernels without the decisions that chose them. An
# operator that decides on the host stays outside of them, in the versions of torch that can be told so.
DECIDES_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def opaque(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the function itself in eager mode, and as one custom operator while PyTorch traces.

    The functions below decide on the host ("is this matrix nearly orthogonal already?"), which a
    tracer cannot follow. As a ``torch.library`` operator they stay a single node of the graph, so that
    ``torch.compile(fullgraph=True)`` and ``torch.export`` keep the fast adaptive code. Eager calls skip
    the operator and its dispatch cost; tensors on the meta device only get their shapes.

    Args:
        fake: takes the same arguments, returns empty tensors of the shapes that the function returns.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def contiguous(*args: Any) -> Any:
            result = function(*args)
            if isinstance(result, Tensor):
                return result.contiguous()
            return tuple(part.contiguous() for part in result)

        # the version in the name keeps compiled graphs that outlive an upgrade from meeting another operator
        name = f"orthogonium_{__version__.replace('.', '_')}::{function.__name__.lstrip('_')}"
        tags: dict[str, Any] = {"tags": DECIDES_ON_THE_HOST} if DECIDES_ON_THE_HOST else {}
        operator = torch.library.custom_op(name, contiguous, mutates_args=(), **tags)
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return operator(*args)
            if args[0].is_meta:
                return fake(*args)
            return function(*args)

        return call

    return decorate
