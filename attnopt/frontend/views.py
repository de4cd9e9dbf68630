"""Views that lead back to what is there: of a write into a part of a tensor, once it is functional.

slice(slice_scatter(x, part, where), where) -> part
slice(x, everything) -> x
slice_scatter(x, part, everywhere) -> part
reshape(reshape(x, ...), the sizes of x) -> x
"""

import sys
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default)


def lead_back(graph_module: fx.GraphModule) -> None:
    """Read what a view leads back to, in place; the graph must be functional."""
    for node in list(graph_module.graph.nodes):
        found = _what_it_is(node)
        if found is not None and _alike(found, node):
            node.replace_all_uses_with(found)


def _what_it_is(node: fx.Node) -> fx.Node | None:
    """Return the node that a view has the values of, if its sizes are the same."""
    given: tuple[Any, ...] = node.args
    source: Any = given[0] if given else None
    found: fx.Node | None = None
    if node.target is aten.slice.Tensor:
        where = part_of(given[1:])
        if _is_everything(where):
            found = source
        elif source.target is aten.slice_scatter.default and part_of(source.args[2:]) == where:
            found = source.args[1]
    elif node.target is aten.slice_scatter.default and _is_everything(part_of(given[2:])):
        found = given[1]
    elif node.target in _RESHAPES:
        while source.target in _RESHAPES and not _alike(source, node):
            source = source.args[0]
        found = source
    return found


def part_of(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return axis, start, end and step of a slice."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    axis, start, end, step = given + defaults[len(given) :]
    return axis, start or 0, sys.maxsize if end is None else end, step


def _is_everything(where: tuple[Any, ...]) -> bool:
    _, start, end, step = where
    return (start, step) == (0, 1) and isinstance(end, int) and end == sys.maxsize


def _alike(found: fx.Node, node: fx.Node) -> bool:
    """Tell whether two values have the same sizes and numbers of one dtype."""
    one, other = found.meta.get("val"), node.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if one.dtype != other.dtype or one.dim() != other.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))
