"""What happens when a :class:`torch.nn.Parameter` is assigned to a constrained tensor."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def refuse_parameters(module: nn.Module) -> None:
    """Let ``module``, just constrained, say why a parameter cannot take the place of a tensor that is computed."""
    parametrized = type(module)
    plain: Any = parametrized.__bases__[0]

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if is_parametrized(self, name):
            found = "None" if param is None else f"a Parameter of shape {tuple(param.shape)}"
            raise TypeError(
                f"{plain.__name__}.{name} is computed from free tensors, so {found} cannot take its place. Assign a "
                f"tensor, module.{name} = tensor.detach(), to give it the nearest value that keeps the constraint; to "
                f"tie or free it, call torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) first"
            )
        plain.register_parameter(self, name, param)

    parametrized.register_parameter = register_parameter  # type: ignore[method-assign]
