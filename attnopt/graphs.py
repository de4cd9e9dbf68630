"""Copies of graphs, and what is cleaned up after an edit."""

import copy

from torch import fx


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
