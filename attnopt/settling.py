"""Compute once, when a graph is made ready to run, what follows from none of its inputs.

A source makes its tables of relative positions anew in every call. What a kernel takes from memory
anyhow is kept, and what many ops make: the mask that a few comparisons make is fused with what
reads it, for less than it would cost to read.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from attnopt.frontend.cleanup import remove_dead
from attnopt.graphs import is_write, schema_of

aten = torch.ops.aten

LARGEST: Final = 2**20
"""Elements of a tensor that is kept, at most."""

_FEWEST: Final = 16
"""Ops that make what is worth keeping for a kernel that reads memory.

Places in a table that 9 ops make (VitDet) compile to less than reading and checking them; 23 ops
and more (MPNet, BEiT) are held.
"""

_MANY: Final = 24
"""Ops that make what is worth keeping for any other op."""

_READING: Final = frozenset({
    aten.index.Tensor, aten.embedding.default, aten.gather.default, aten.index_select.default,
    aten.take.default, aten.einsum.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.matmul.default, aten.linear.default,
})  # fmt: skip
_SPREADING: Final = frozenset({aten.expand.default, aten.unsqueeze.default})


def settle(graph_module: fx.GraphModule, known: Mapping[str, Tensor] | None = None) -> None:
    """Put values where nodes follow from no input, in place; of `known` inputs the value is given.

    The graph must be functional.
    """
    constants = _constants(graph_module, known or {})
    settled = _settled(graph_module.graph, constants)
    wanted = [n for n in settled if n not in constants and _is_worth_it(n, settled)]
    wanted = list(dict.fromkeys(map(_unspread, wanted)))
    if not wanted:
        return
    values = _computed(wanted, constants)
    kept: dict[fx.Node, Tensor] = {}
    for node in wanted:
        value = values[node]
        twin = next((n for n, x in kept.items() if _is_same(x, value)), None)
        if twin is None:
            twin = _attribute(graph_module, value, node)
            kept[twin] = value
        node.replace_all_uses_with(twin)
    remove_dead(graph_module)
    graph_module.recompile()


def _constants(graph_module: fx.GraphModule, known: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    """Return the nodes that have a value before anything is computed."""
    found: dict[fx.Node, Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in known:
            found[node] = known[node.name]
        elif node.op == "get_attr":
            value: Any = operator.attrgetter(str(node.target))(graph_module)
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                found[node] = value
    return found


def _settled(graph: fx.Graph, constants: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """Return the nodes that follow from constants alone, in the order of the graph."""
    found: dict[fx.Node, None] = dict.fromkeys(constants)
    for node in graph.nodes:
        if _is_repeatable(node) and all(n in found for n in node.all_input_nodes):
            found[node] = None
    return found


def _is_repeatable(node: fx.Node) -> bool:
    """Tell whether a node gives the same tensors of fixed sizes for the same inputs, always."""
    target = node.target
    if target is not operator.getitem:
        if not isinstance(target, OpOverload) or is_write(node):
            return False
        if torch.Tag.nondeterministic_seeded in target.tags or "empty" in target.name():
            return False
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(x, Tensor) and _is_small(x) for x in values)


def _is_small(tensor: Tensor) -> bool:
    sizes: Any = tensor.shape
    return all(isinstance(x, int) for x in sizes) and tensor.numel() <= LARGEST


def _is_worth_it(node: fx.Node, settled: Mapping[fx.Node, None]) -> bool:
    """Tell whether a tensor that something else reads takes more to make than to keep."""
    readers = [n for n in node.users if n not in settled]
    if not readers or not isinstance(node.meta["val"], Tensor) or _is_returned(_unspread(node)):
        return False
    fewest = _FEWEST if any(n.target in _READING for n in readers) else _MANY
    return sum(n.op == "call_function" for n in _sources([node])) >= fewest


def _is_returned(node: fx.Node) -> bool:
    """Tell whether a result of the graph is, or shares the memory of, what a node makes.

    Whoever called may write to it, which must not reach the next call.
    """
    for user in node.users:
        target = user.target
        if user.op == "output":
            return True
        shares = target is operator.getitem or (
            isinstance(target, OpOverload)
            and any(r.alias_info is not None for r in schema_of(target).returns)
        )
        if shares and _is_returned(user):
            return True
    return False


def _unspread(node: fx.Node) -> fx.Node:
    """Return what is only repeated, or seen with more axes."""
    while node.target in _SPREADING:
        (node,) = node.all_input_nodes
    return node


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return nodes and all that they are made of."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _computed(wanted: list[fx.Node], constants: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
    """Return the values of nodes, and of all that they are made of."""
    values: dict[fx.Node, Any] = dict(constants)
    with torch.inference_mode(False), torch.no_grad():
        for node in sorted(_sources(wanted)):
            if node not in values:
                function: Any = node.target
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = function(*args, **kwargs)
    return values


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def _attribute(graph_module: fx.GraphModule, value: Tensor, node: fx.Node) -> fx.Node:
    """Hold a value in the module, and return the node that reads it before all others."""
    taken = dict(graph_module.named_buffers())
    name = next(n for i in range(len(taken) + 1) if (n := f"settled_{i}") not in taken)
    with torch.inference_mode(False):
        graph_module.register_buffer(name, value.clone(), persistent=False)
    first = next(n for n in graph_module.graph.nodes if n.op != "placeholder")
    with graph_module.graph.inserting_before(first):
        made = graph_module.graph.get_attr(name)
    made.meta = dict(node.meta)
    return made
