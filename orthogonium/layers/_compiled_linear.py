"""Linear layers in compiled evaluation: a product with the remembered weight in place of a copy of it."""

from typing import Any

import torch
from torch import Tensor, nn

from orthogonium.layers._direct_reading import lone_constraint
from orthogonium.parametrizations.compiled_evaluation import remembered_product


def multiply_without_copy(module: nn.Module) -> None:
    """Let ``module``, just constrained, multiply by the weight where it lies, if it is linear as torch's are."""
    parametrized = type(module)
    if isinstance(module, nn.Linear) and parametrized.forward is nn.Linear.forward:
        parametrized.forward = _forward


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        product = _product(self, input)
        if product is not None:
            return product
    return nn.functional.linear(input, self.weight, self.bias)


def _product(module: Any, inputs: Tensor) -> Tensor | None:
    found = lone_constraint(module, "weight")
    if found is None or torch.is_autocast_enabled(inputs.device.type):
        return None
    constraint, originals = found
    if len(originals) > 1 or not constraint.is_looked_up(originals):
        return None
    original, bias = originals[0], module.bias
    if bias is None or bias.dtype != original.dtype or bias.dtype not in (torch.float32, torch.float64):
        return remembered_product(inputs, bias, original, constraint.number)
    # left to the compiler, which adds the bias while it goes over the product for the activation
    return remembered_product(inputs, None, original, constraint.number) + bias
