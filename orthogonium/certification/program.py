"""A traced model as a program of plain float64 modules, with every change in place made an ordinary operation."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium.certification.frozen import frozen, frozen_tensor
from orthogonium.certification.rules.registry import rule_for_function, rule_for_module
from orthogonium.certification.tracing import named, trace

_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
_IN_PLACE |= {operator.itruediv: operator.truediv}

_SIZES = {"shape", "ndim"}
_TYPES = {"dtype", "device", "is_cuda", "requires_grad", "itemsize"}
_SIZE_METHODS = {"size", "dim", "ndimension", "numel", "nelement"}
_TYPE_METHODS = {"is_floating_point", "stride"}


def plain_network(model: nn.Module) -> nn.Module:
    """The network that certificates speak of: ``model`` as traced, with plain float64 weights and no constraint.

    It shares no memory with ``model``, and is what to attack when looking for a wrong certificate.

    Raises:
        TypeError, ValueError: as :func:`~orthogonium.lipschitz_bound`, but for missing rules.
    """
    return build_program(model)[0]


def build_program(model: nn.Module) -> tuple[fx.GraphModule, dict[str, nn.Module]]:
    generator = torch.random.get_rng_state()
    graph, constants = trace(model)
    parts: dict[str, Any] = {}
    originals: dict[str, nn.Module] = {}
    names: dict[int, str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = node.meta["module"]
            path = node.meta["path"] = node.target
            if id(module) not in names:
                names[id(module)] = f"module_{len(names)}"
                parts[names[id(module)]] = _frozen_twice(module, named(path))
                originals[names[id(module)]] = module
            node.target = names[id(module)]
            node.meta.pop("module")
        elif node.op == "get_attr":
            scope = node.meta["scope"]
            parts[node.target] = frozen_tensor(constants[node.target], f"a constant of {named(scope)}", "Tensor")
    _check_in_place(graph, originals)
    if not torch.equal(torch.random.get_rng_state(), generator):
        raise TypeError("the model draws random numbers in evaluation, so one bound cannot cover the next call")
    return fx.GraphModule(parts, graph).eval(), originals


def _frozen_twice(module: nn.Module, path: str) -> nn.Module:
    """:func:`frozen`, where reading a weight is the same each time. Constraints of this library and of torch are."""
    copy = frozen(module, path)
    own = [type(part).__module__.split(".")[0] for part in module.modules()]
    if is_parametrized(module) and not {"torch", "orthogonium"}.issuperset(own):
        again = dict(frozen(module, path).named_buffers())
        for name, value in copy.named_buffers():
            if not torch.equal(value, again[name]):
                raise TypeError(f"{path} has another {name} each time that it is read, so one bound cannot cover them")
    return copy


def _check_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Refuse operations in place whose input is read afterwards, and make the others ordinary ones."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        inplace = node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))
        inplace = inplace or (node.op == "call_module" and bool(getattr(modules[str(node.target)], "inplace", False)))
        inplace = inplace or getattr(node.target, "__name__", str(node.target)) in ("relu_",)
        if not inplace:
            continue
        if node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
        node.target = {"relu_": "relu", torch.relu_: torch.relu, torch.nn.functional.relu_: torch.relu}.get(
            node.target, node.target
        )
        target = node.all_input_nodes[0] if node.all_input_nodes else None
        shared, front = set(), [] if target is None else [target]
        while front:  # everything whose memory it may change: back to where that was allocated, and all other views
            other = front.pop()
            if other not in shared:
                shared.add(other)
                front += [user for user in other.users if order[user] < order[node] and not _allocates(user, modules)]
                if not _allocates(other, modules):
                    front += other.all_input_nodes
        late = {user for other in shared for user in other.users if order[user] > order[node] and user is not node}
        if late:
            path = named(node.meta.get("path") or node.meta["scope"])
            raise TypeError(
                f"{path} works in place on a tensor that is read again afterwards, by {next(iter(late)).name}. "
                f"Use inplace=False, or x = x + y in place of x += y"
            )


def is_size(node: fx.Node) -> bool:
    """Whether it reads a size or a type of a tensor, and none of its entries."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS | _TYPE_METHODS
    return node.target is getattr and node.args[1] in _SIZES | _TYPES


def reads_type(node: fx.Node) -> bool:
    """Whether it reads what may differ between evaluations of one size."""
    return is_size(node) and (node.target in _TYPE_METHODS or (node.target is getattr and node.args[1] in _TYPES))


def _allocates(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether its result has memory of its own."""
    if is_size(node):
        return True
    rule = rule_for_module(modules[str(node.target)]) if node.op == "call_module" else rule_for_function(node.target)
    return node.op in ("call_module", "call_function", "call_method") and rule is not None and rule.fresh


def run(
    program: fx.GraphModule,
    x: Tensor,
    *,
    abstract: bool = False,
    results: dict[fx.Node, Any] | None = None,
    visit: Callable[[fx.Node, Any], None] | None = None,
) -> None:
    """Evaluate node by node. ``visit`` sees each result; ``results`` keeps them all."""
    device = "meta" if abstract else "cpu"
    env: dict[fx.Node, Any] = {} if results is None else results
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    metas: dict[str, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            try:
                if node.op == "placeholder":
                    env[node] = x.to(device)
                elif node.op == "get_attr":
                    env[node] = getattr(program, node.target).to(device)
                elif node.op == "call_module":
                    module = getattr(program, node.target)
                    if abstract:
                        module = metas.setdefault(node.target, frozen(module, "", "meta"))
                    env[node] = module(*args, **kwargs)
                elif node.op == "call_function":
                    env[node] = node.target(*args, **kwargs)
                elif node.op == "call_method":
                    env[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    env[node] = args[0]
            except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
                path = named(node.meta.get("path") or node.meta["scope"])
                shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
                raise ValueError(f"{path} cannot take an input of shape {shapes}: {error}") from error
            if visit is not None:
                visit(node, env[node])
            if results is None:
                for used in node.all_input_nodes:
                    if last[used] is node:
                        del env[used]
