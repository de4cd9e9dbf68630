"""Copies of graphs, what is cleaned up after an edit, and what the schema of an op says."""

import copy
from typing import Any

from torch import fx
from torch._ops import OpOverload


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph with its metadata; also return which node became which."""
    result = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result.output(result.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
        if old.op == "placeholder":  # fx renames what is called like a builtin, such as "input"
            new.name, new.target = old.name, old.target
    return result, mapping


def copied_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph module whose nodes keep their example values."""
    return fx.GraphModule(graph_module, copied(graph_module.graph)[0])


def drop_unused(graph: fx.Graph) -> None:
    """Remove what nobody reads, ops with dropout among it, which count as impure otherwise."""
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def schema_of(target: OpOverload[Any, Any]) -> Any:
    """Return the schema of an op, which torch keeps in an attribute of its own."""
    return vars(target)["_schema"]


def is_write(node: fx.Node) -> bool:
    """Tell whether a node changes a tensor in place."""
    return isinstance(node.target, OpOverload) and bool(schema_of(node.target).is_mutable)
