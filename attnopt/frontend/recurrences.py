"""Recurrences over tokens that go on from the state a cache holds, where the source forgets it.

Several Mamba models of Transformers read their recurrent state in steps of one token only, and let
a step of several tokens start from zeros although it hands its last state on. Before the first
token the state is zeros, so one graph that always reads it computes what the source does in a
prefill and in a step of one token; after a prefill, it keeps the past of several tokens too.
"""

import operator
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnopt.ops.recurrence import linear_recurrence
from attnopt.ops.selective import selective_scan

_aten = torch.ops.aten
_ZEROS = frozenset({_aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default})
_COPIES = frozenset({_aten.clone.default, _aten.alias.default})


def go_on(graph_module: fx.GraphModule, outputs: Mapping[str, int]) -> None:
    """Let recurrences from zeros start from unread states instead, in place.

    `outputs` has the number of the output with a state's successor by the state's placeholder.
    """
    graph = graph_module.graph
    results: Any = graph.output_node().args[0]
    for state in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        recurrence = _recurrence(results[outputs[state.name]]) if state.name in outputs else None
        if recurrence is not None and _starts_from_zeros(recurrence, like=state):
            _start(recurrence, state)
    graph_module.recompile()


def _recurrence(node: fx.Node) -> fx.Node | None:
    """Return the recurrence whose last state a node is."""
    while _is_last(node) or _is_whole(node) or _is_same(node):
        node = node.all_input_nodes[0]
    return node if node.target in (linear_recurrence, selective_scan) else None


def _is_last(node: fx.Node) -> bool:
    """Say whether a node is the last of all states, or the second result, which that is."""
    of_all = node.target is _aten.select.int and node.args[1:] == (1, -1)
    return of_all or bool(node.target is operator.getitem and node.args[1] == 1)


def _is_same(node: fx.Node) -> bool:
    """Say whether a node copies its operand, or casts it to the dtype that it has."""
    if node.target is not _aten.to.dtype:
        return node.target in _COPIES
    return node.meta["val"].dtype is node.all_input_nodes[0].meta["val"].dtype


def _is_whole(node: fx.Node) -> bool:
    return node.target is _aten.slice.Tensor and node.args[2:] in ((), (0, sys.maxsize))


def _starts_from_zeros(recurrence: fx.Node, *, like: fx.Node) -> bool:
    initial: Any = recurrence.args[-1]
    found, stored = initial.meta["val"], like.meta["val"]
    alike = found.dtype is stored.dtype and found.shape[1:] == stored.shape[1:]
    return initial.target in _ZEROS and alike


def _start(recurrence: fx.Node, state: fx.Node) -> None:
    *given, initial = recurrence.args
    assert isinstance(initial, fx.Node)
    state.meta["val"] = initial.meta["val"]
    recurrence.args = (*given, state)
