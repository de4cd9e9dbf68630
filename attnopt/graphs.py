"""Copies of graphs, and what is cleaned up after an edit."""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

# What a graph captured in low precision says where it comes back from float32.
_LOW = (torch.bfloat16, torch.float16)


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


def drop_unused(graph: fx.Graph) -> None:
    """Remove what nobody reads, ops with dropout among it, which count as impure otherwise."""
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))


def in_dtype(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """Return a graph whose casts to low precision go to another dtype; itself if it has none."""
    known = _CAST.setdefault(module, {})
    if dtype not in known:
        known[dtype] = _recast(module, dtype)
    return known[dtype] or module


def other_dtype(given: Any, dtype: torch.dtype) -> Any:
    """Replace low precision by another dtype in the arguments of a node."""
    return fx.node.map_aggregate(
        given, lambda x: dtype if isinstance(x, torch.dtype) and x in _LOW else x
    )


def _recast(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule | None:
    graph, _ = copied(module.graph)
    changed = False
    for node in graph.nodes:
        args, kwargs = other_dtype(node.args, dtype), other_dtype(node.kwargs, dtype)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, changed = args, kwargs, True
    return fx.GraphModule(module, graph) if changed else None


_CAST: "WeakKeyDictionary[fx.GraphModule, dict[torch.dtype, fx.GraphModule | None]]" = (
    WeakKeyDictionary()
)
