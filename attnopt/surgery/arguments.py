"""The sizes that are written in the arguments of views, splits and slices, made to fit."""

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.ops import args, kind, value

aten = torch.ops.aten

_SIZED = frozenset("view _unsafe_view reshape expand".split())
SPLITTING = frozenset("split split_with_sizes chunk unsafe_split unsafe_chunk".split())


def dim_of(node: fx.Node, position: int) -> int:
    """Read the axis that an op works along."""
    source = args(node)[0]
    axes = value(source).dim()
    given = node.kwargs.get("dim", args(node)[position] if len(args(node)) > position else 0)
    return int(given) % axes if isinstance(given, int) else 0


def fewer(size: Any, along: Tensor) -> Any:
    """Return the size of what stays along an axis, in which heads may be counted with the batch."""
    share = Fraction(int(along.sum()), len(along))
    return size // share.denominator * share.numerator


def _sizes(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Write the new sizes of a view."""
    if not isinstance(new.args[1], list | tuple):
        return
    written = [
        size if along.all() or size == -1 else _rewritten(new, size, along)
        for size, along in zip(new.args[1], keeps[node][0], strict=True)
    ]
    new.args = (new.args[0], written, *new.args[2:])


def _rewritten(new: fx.Node, size: Any, along: Tensor) -> Any:
    """Return a written size of what stays, a number or a node that computes it."""
    if not isinstance(size, fx.Node):
        return int(along.sum())
    share = Fraction(int(along.sum()), len(along))
    with new.graph.inserting_before(new):
        parts = new.graph.call_function(operator.floordiv, (size, share.denominator))
        parts.meta["val"] = value(size) // share.denominator
        whole = new.graph.call_function(operator.mul, (parts, share.numerator))
    whole.meta["val"] = fewer(value(size), along)
    return whole


def _unflattened(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    axis, written = dim_of(node, 1), list(args(new)[2])
    for i in range(len(written)):
        along = keeps[node][0][axis + i]
        if not along.all() and written[i] != -1:
            written[i] = int(along.sum())
    new.args = (new.args[0], new.args[1], written)


def _pieces(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Write the new sizes of the pieces of a split."""
    axis = dim_of(node, 2)
    sizes = [int(axes[axis].sum()) for axes in keeps[node]]
    source = new.args[0]
    if "chunk" in kind(node) and len(set(sizes)) == 1:
        return
    if isinstance(args(node)[1], int) and "chunk" not in kind(node) and len(set(sizes)) == 1:
        new.args = (source, sizes[0], axis)
        return
    new.target, new.args, new.kwargs = aten.split_with_sizes.default, (source, sizes, axis), {}


def _cut(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Move the ends of a slice to where they come to lie."""
    axis = dim_of(node, 1)
    source = args(node)[0]
    if source not in keeps or keeps[source][0][axis].all():
        return
    stays = keeps[source][0][axis]
    start, stop = (node.args[i] if len(node.args) > i else None for i in (2, 3))
    size = len(stays)
    first = 0 if not isinstance(start, int) else start % size if start < 0 else min(start, size)
    last = size if not isinstance(stop, int) else stop % size if stop < 0 else min(stop, size)
    moved = (int(stays[:first].sum()), int(stays[:last].sum()))
    new.args = (new.args[0], axis, *moved, *new.args[4:])


ARGUMENTS: dict[str, Callable[[fx.Node, fx.Node, Mapping[fx.Node, list[list[Tensor]]]], None]] = {
    **dict.fromkeys(_SIZED, _sizes),
    **dict.fromkeys(SPLITTING, _pieces),
    "unflatten": _unflattened,
    "slice": _cut,
}
