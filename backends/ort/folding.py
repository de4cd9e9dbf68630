"""Fold a growing cache into the attention that reads it: one op takes the past and gives the whole.

keys = cat(past_keys, new); values = cat(past_values, new); attention(q, keys, values)
-> cached_attention(q, new, new, past_keys, past_values, past_length)
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.ops import attention, cached_attention
from attnopt.program import State

aten = torch.ops.aten
_TOKENS_AXIS = (2, -2)


def fold_caches(graph_module: fx.GraphModule, states: Sequence[State]) -> int:
    """Replace, in place, each attention over the whole of a growing cache; return how many."""
    graph = graph_module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    kept = {s.placeholder: s for s in states if s.grows == 2}
    folded = 0
    for node in graph.find_nodes(op="call_function", target=attention):
        pairs = [_lengthened(x, kept) for x in node.args[1:3]]
        if all(pairs) and all(order[u] >= order[node] for x in node.args[1:3] for u in x.users):
            _fold(node, [p for p in pairs if p is not None])
            folded += 1
    graph.lint()
    graph_module.recompile()
    return folded


def _lengthened(whole: Any, states: Mapping[str, State]) -> tuple[fx.Node, fx.Node] | None:
    """Return the past and the new part of keys or values, where they are a cache made longer."""
    if whole.op != "call_function" or whole.target is not aten.cat.default:
        return None
    parts, axis = whole.args[0], (*whole.args[1:], 0)[0]
    if len(parts) != 2 or axis not in _TOKENS_AXIS or parts[0].name not in states:
        return None
    return parts[0], parts[1]


def _fold(node: fx.Node, pairs: list[tuple[fx.Node, fx.Node]]) -> None:
    (past_k, k), (past_v, v) = pairs
    wholes: Any = node.args[1:3]
    graph = node.graph
    with graph.inserting_before(node):
        length = graph.call_function(aten.sym_size.int, (past_k, 2))
        length.meta["val"] = past_k.meta["val"].shape[2]
        arguments = (node.args[0], k, v, past_k, past_v, length)
        made = graph.call_function(cached_attention, arguments, dict(node.kwargs))
        made.meta = {**node.meta, "val": tuple(x.meta["val"] for x in (node, *wholes))}
        for number, old in enumerate((node, *wholes)):
            part = graph.call_function(operator.getitem, (made, number))
            part.meta = dict(old.meta)
            old.replace_all_uses_with(part)
    for old in (node, *wholes):
        graph.erase_node(old)
