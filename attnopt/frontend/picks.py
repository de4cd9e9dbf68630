"""Neighbours that a list of numbers picks, such as x[..., [-2], :], as slices.

A list is a constant tensor of the graph: whatever changes how many heads there are would have to
count in it anew, and runtimes gather by it element by element.
"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from attnopt.frontend.cleanup import remove_dead

_aten = torch.ops.aten


def picks_as_slices(graph_module: fx.GraphModule, lists: Mapping[str, Tensor]) -> None:
    """Slice where a list of neighbours picks, in place; `lists` has constants by placeholder."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_aten.index.Tensor):
        source, indices = node.args
        given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
        if len(given) != 1:
            continue
        axis, index = given[0]
        numbers = lists.get(_copied_from(index).name)
        bounds = None if numbers is None else _bounds(numbers)
        if bounds is None:
            continue
        with graph.inserting_before(node):
            picked = graph.call_function(_aten.slice.Tensor, (source, axis, *bounds))
            # A pick by a list is a copy, and what follows may count on its layout.
            copied = graph.call_function(_aten.clone.default, (picked,))
        copied.kwargs = {"memory_format": torch.contiguous_format}
        value = _aten.slice.Tensor(source.meta["val"], axis, *bounds)
        picked.meta, copied.meta = {**node.meta, "val": value}, dict(node.meta)
        node.replace_all_uses_with(copied)
        graph.erase_node(node)
    remove_dead(graph_module)


def _copied_from(node: fx.Node) -> fx.Node:
    """Return what a node is a copy of: a list of the source is copied before it is read."""
    while node.target is _aten.clone.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _bounds(numbers: Tensor) -> tuple[int, int] | None:
    """Return the slice that a list of numbers is, counted from one side."""
    if numbers.dim() != 1 or not numbers.numel() or numbers.dtype is not torch.int64:
        return None
    first, last = int(numbers[0]), int(numbers[-1])
    rising = numbers.tolist() == list(range(first, last + 1))
    if not rising or first < 0 <= last:
        return None
    return first, sys.maxsize if last == -1 else last + 1
