"""A traced model with a rule applied to every call: what bounds and certificates start from."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from orthogonium.certification.program import build_program, is_size, reads_type, run
from orthogonium.certification.rounding import hypot_up, sum_up, times_up
from orthogonium.certification.rules.registry import (
    EXACT,
    Refused,
    Response,
    Rule,
    Unknown,
    Variable,
    as_double,
    plain_type,
    rule_for_function,
    rule_for_module,
)
from orthogonium.certification.tracing import named

_BATCHES = (2, 4)
_ODD_BATCHES = (1, 3)  # numbers made from sizes may be others there
_TYPED = Unknown("the type, device or strides of a tensor, which are not the same in each evaluation. Use a constant")


@dataclass(frozen=True)
class Step:
    """One call that depends on the input.

    Attributes:
        node: in the graph; ``inputs`` are those it reads that depend on the network's input, in order.
        path: of the module that is called, or that makes the call.
        kind: the type of the module, or the name of the function.
        response: what its rule said.
        constants: one per input, the Lipschitz constants of the call.
        bound: of the network up to here.
        shape: of its result for one sample, where known.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    path: str
    kind: str
    response: Response
    constants: tuple[float, ...]
    bound: float
    shape: tuple[int, ...] | None

    @property
    def constant(self) -> float:
        """Of the call as a function of all its inputs together."""
        return (
            hypot_up(self.constants) if len(self.constants) > 1 and not self.response.stacked else max(self.constants)
        )

    def combined(self, values: Sequence[float]) -> float:
        """What changes of these sizes in the inputs can change, rounded up."""
        return (hypot_up if self.response.stacked else sum_up)(map(times_up, self.constants, values))


@dataclass
class Network:
    """``program`` computes the network in float64; ``steps`` in order, by node."""

    program: fx.GraphModule
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    output: fx.Node | None = None

    @property
    def bound(self) -> float:
        return self.steps[self.output].bound if self.output in self.steps else 0.0


def analyse(model: nn.Module, input_shape: Sequence[int] | None = None) -> Network:
    """Trace ``model``, apply the rules, and compose.

    Args:
        model: maps one tensor ``(N, ...)`` to one tensor.
        input_shape: of one input, without the batch.

    Raises:
        TypeError: a call is not known, or refused; the message names its path.
        ValueError: training mode, weights that are not finite or complex, inputs that a layer does not take.
    """
    shape = None if input_shape is None else _checked_shape(input_shape)
    program, originals = build_program(model)
    network = Network(program)
    values = None if shape is None else _shapes(program, shape)
    holders: dict[fx.Node, Any] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            shape = None if values is None else _result_shape(node, values)
            holders[node] = Variable(shape, "input")
            network.steps[node] = Step(node, (), "", "input", Response(1.0, EXACT), (), 1.0, shape and shape[1:])
        elif node.op == "get_attr":
            holders[node] = getattr(program, node.target)
        elif node.op == "output":
            network.output = _checked_output(node, holders)
        else:
            holders[node] = _apply(node, network, originals, holders, values)
    assert len(placeholders) == 1
    return network


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(side) for side in input_shape)
    except TypeError:
        raise TypeError(
            f"input_shape must be the sizes of one input, such as (3, 32, 32), got {input_shape!r}"
        ) from None
    if any(side < 0 for side in shape):
        raise ValueError(f"input_shape must hold sizes of at least 0, got {shape}")
    return shape


def _checked_output(node: fx.Node, holders: dict[fx.Node, Any]) -> fx.Node:
    result = node.args[0]
    if not isinstance(result, fx.Node):
        raise TypeError(f"the model must return one tensor, got {type(result).__name__}. Wrap it and pick one")
    if isinstance(holders[result], Tensor):
        raise TypeError("the model returns a constant: nothing depends on its input")
    if not isinstance(holders[result], Variable):
        raise TypeError("the model must return one tensor, got a size or a number")
    return result


def _apply(
    node: fx.Node,
    network: Network,
    originals: dict[str, nn.Module],
    holders: dict[fx.Node, Any],
    values: list[dict[fx.Node, Any]] | None,
) -> Any:
    """Record the step of ``node``; what stands for its result."""
    if node.target is operator.getitem and not node.users:  # as of the indices in `values, _ = x.max(dim=1)`
        return Variable(None)
    inputs: list[fx.Node] = []

    def stand_in(argument: fx.Node) -> Any:
        if isinstance(holders[argument], Variable):
            inputs.append(argument)
        return holders[argument]

    given, named_ones = node.args, dict(node.kwargs)
    if not given and "input" in named_ones:  # what torch calls the first argument of most functions and modules
        given = (named_ones.pop("input"),)
    args, kwargs = fx.map_arg(given, stand_in), fx.map_arg(named_ones, stand_in)
    if not inputs and _is_cast(node):  # to the type of an input: here everything is computed in float64
        return as_double(cast(Tensor, args[0]))
    if not inputs or is_size(node):
        return _unvarying(node, values, holders)
    path, kind, rule = _described(node, originals)
    if rule is None:
        raise TypeError(
            f"{named(path)} {_article(node)} {kind}, whose Lipschitz constant is not known here. Give it a rule with "
            f"orthogonium.certification.lipschitz_rule, or replace it"
        )
    if node.kwargs.get("out") is not None:
        raise TypeError(f"{named(path)} ({kind}) writes into out=, which is not followed. Use the result")
    module = (getattr(network.program, str(node.target)),) if node.op == "call_module" else ()
    try:
        response = rule.answer(*module, *args, **kwargs)
    except Refused as refusal:
        raise TypeError(f"{named(path)} ({kind}) {refusal}") from None
    except (ValueError, RuntimeError) as error:
        _result_shape(node, values or [], path, kind)  # the call itself may say it better
        raise ValueError(f"{named(path)} ({kind}): {error}") from error
    except (TypeError, AttributeError, LookupError, StopIteration) as error:
        raise TypeError(f"{named(path)} ({kind}) is called in a way that its rule does not know: {error}") from error
    shape = None if values is None else _result_shape(node, values, path, kind)
    if not isinstance(response, Response):
        response = Response(float(response))
    constants = response.lipschitz if isinstance(response.lipschitz, tuple) else (response.lipschitz,) * len(inputs)
    if len(constants) != len(inputs) or not all(c >= 0 for c in constants):
        raise TypeError(
            f"the rule for {kind} at {named(path)} gave {response.lipschitz}: a constant of at least 0 for each of its "
            f"{len(inputs)} inputs is needed"
        )
    step = Step(node, tuple(inputs), path, kind, response, tuple(constants), 0.0, shape and shape[1:])
    bound = step.combined([network.steps[i].bound for i in inputs])
    network.steps[node] = Step(node, tuple(inputs), path, kind, response, tuple(constants), bound, shape and shape[1:])
    return Variable(shape, "" if response.stacked else kind)  # the maximum of two tensors has no indices


def _described(node: fx.Node, originals: dict[str, nn.Module]) -> tuple[str, str, Rule | None]:
    if node.op == "call_module":
        module = originals[str(node.target)]
        return node.meta["path"], plain_type(module).__name__, rule_for_module(module)
    kind = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return node.meta["scope"], kind, rule_for_function(node.target)


def _article(node: fx.Node) -> str:
    return "is a" if node.op == "call_module" else "calls"


def _is_cast(node: fx.Node) -> bool:
    """Whether a constant is brought to the type or the device that a tensor has."""
    if node.op != "call_method" or node.target != "to":
        return False
    constant, *others = node.all_input_nodes
    asked = [other for other in others if other.target is getattr and other.args[1] in ("dtype", "device")]
    return constant.op == "get_attr" and asked == others


def _unvarying(node: fx.Node, values: list[dict[fx.Node, Any]] | None, holders: dict[fx.Node, Any]) -> Any:
    """A result that depends on sizes and constants only: its value, if it is the same for all batch sizes."""
    found = [value.get(node, Unknown()) for value in values or ({}, {})]
    first = found[0]
    if isinstance(first, Tensor) or (values is None and not _is_number(node)):
        raise TypeError(
            f"{named(node.meta['scope'])} computes a tensor from sizes ({node.name}), which is not known here"
        )
    used = [holders[i] for i in node.all_input_nodes]
    if isinstance(first, torch.dtype | torch.device):
        return first
    if reads_type(node) or any(h == _TYPED or isinstance(h, torch.dtype | torch.device) for h in used):
        return _TYPED
    return first if all(type(other) is type(first) and other == first for other in found) else Unknown()


def _is_number(node: fx.Node) -> bool:
    """Whether it is a size, or arithmetic with sizes alone: anything else may be a tensor."""
    arithmetic = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
    return is_size(node) or (arithmetic and all(used.op != "get_attr" for used in node.all_input_nodes))


def _shapes(program: fx.GraphModule, input_shape: tuple[int, ...]) -> list[dict[fx.Node, Any]]:
    """Every result for some batch sizes, without data where possible. Of the odd ones only what can be computed."""
    results = []
    counts = any(is_size(node) for node in program.graph.nodes)
    for batch in (*_BATCHES, *(_ODD_BATCHES if counts else ())):
        x = torch.zeros(batch, *input_shape, dtype=torch.float64)
        for abstract in (True, False):  # some modules read values
            found: dict[Any, Any] = {}
            try:
                run(program, x, abstract=abstract, results=found)
                break
            except ValueError as error:
                found["failure"] = error  # raised when a rule has not said it better
        results.append(found)
    return results[: len(_BATCHES)] + [found for found in results[len(_BATCHES) :] if "failure" not in found]


def _result_shape(
    node: fx.Node, values: list[dict[fx.Node, Any]], path: str = "", kind: str = ""
) -> tuple[int, ...] | None:
    """The shape with batch of a tensor; refuses results in which the batch is not in front."""
    values = values[: len(_BATCHES)]
    for value in values:
        if node not in value:
            raise value["failure"]  # type: ignore[index]
    results = [value[node] for value in values]
    if not results or not all(isinstance(result, Tensor) for result in results):
        return None
    shapes = [tuple(result.shape) for result in results]
    leading = [shape[:1] for shape in shapes]
    if leading != [(batch,) for batch in _BATCHES] or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"{named(path)} ({kind}) merges or moves the batch: from {_BATCHES[0]} and {_BATCHES[1]} inputs it makes "
            f"{shapes[0]} and {shapes[1]}. Every input is certified on its own, so keep the batch in front"
        )
    return shapes[0]
