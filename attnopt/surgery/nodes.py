"""Narrow the nodes of a line: each keeps along its axes what its elements say."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.emit import fake_mode_of
from attnopt.finder.ops import TRANSPARENT, argument, kind, shape, value
from attnopt.finder.provenance import ELEMENTWISE
from attnopt.nouns import No
from attnopt.surgery.arguments import ARGUMENTS, fewer
from attnopt.surgery.edit import GraphEdit
from attnopt.surgery.obstacles import cannot_narrow, read_elsewhere
from attnopt.surgery.selection import Selection


def narrow_line(
    edit: GraphEdit,
    selection: Selection,
    carriers: Collection[fx.Node],
    readers: set[fx.Node],
    last: str,
) -> No | None:
    """Narrow the nodes that carry what changes; nothing is changed where one of them cannot be.

    `readers` may read them, and so may the product with the weight called `last`.
    """
    wanted = set(carriers)
    line = [n for n in edit.program.graph.nodes if n in wanted]
    keeps: dict[fx.Node, list[list[Tensor]]] = {}
    for node in line:
        kept = selection.keeps(node)
        if isinstance(kept, No):
            return kept
        keeps[node] = kept
    keeps |= _attached(edit, keeps)
    inside = set(keeps)
    changed = {n for n, found in keeps.items() if not all(bool(a.all()) for x in found for a in x)}
    for refusal in (
        read_elsewhere(edit, changed, inside | readers, last),
        *(cannot_narrow(node, keeps, inside) for node in line),
    ):
        if refusal is not None:
            return refusal
    for node in keeps:
        _narrow_node(edit, node, keeps)
    return None


def _attached(
    edit: GraphEdit, keeps: Mapping[fx.Node, list[list[Tensor]]]
) -> dict[fx.Node, list[list[Tensor]]]:
    """Find what is computed of each head alone, such as the size that a norm divides by."""
    found: dict[fx.Node, list[list[Tensor]]] = {}
    for node in edit.program.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in keeps or n in found]
        if node in keeps or len(sources) != 1 or not isinstance(value(node), Tensor):
            continue
        (axes, *others) = keeps.get(sources[0]) or found[sources[0]]
        if others or all(bool(a.all()) for a in axes):
            continue
        if kind(node) in ELEMENTWISE | TRANSPARENT and shape(node) == shape(sources[0]):
            found[node] = [axes]
        elif kind(node) in _REDUCING:
            left = _reduced(node, axes)
            if left is not None:
                found[node] = [left]
        elif kind(node) == "slice" and 0 in shape(node):
            # A rotation of all channels leaves an empty rest.
            found[node] = [[a[:0] if n == 0 else a for a, n in zip(axes, shape(node), strict=True)]]
    return found


_REDUCING = frozenset("mean sum amax amin var linalg_vector_norm norm".split())


def _reduced(node: fx.Node, axes: list[Tensor]) -> list[Tensor] | None:
    """Return what stays along the axes of a mean or sum over axes that stay whole."""
    place = 2 if kind(node) in ("linalg_vector_norm", "norm") else 1
    given = argument(node, place, "dim")
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, list | tuple):
        return None
    over = {d % len(axes) for d in dims}
    if not all(bool(axes[d].all()) for d in over):
        return None
    if len(shape(node)) == len(axes):
        one = torch.ones(1, dtype=torch.bool)
        return [one if i in over else a for i, a in enumerate(axes)]
    return [a for i, a in enumerate(axes) if i not in over]


def _narrow_node(
    edit: GraphEdit, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]
) -> None:
    """Change the sizes of a node, in its arguments and in its example value."""
    mine = keeps[node]
    near = [mine, *(keeps[n] for n in node.all_input_nodes if n in keeps)]
    if all(bool(along.all()) for found in near for axes in found for along in axes):
        return
    new = edit.mapping[node]
    change = ARGUMENTS.get(kind(node))
    if change is not None:
        change(new, node, keeps)
    if node.op == "placeholder":
        _narrow_state(edit, node, mine[0])
    example = value(new)
    one = isinstance(example, Tensor)
    shapes = [_smaller(x, a) for x, a in zip([example] if one else example, mine, strict=True)]
    with fake_mode_of((node,)):
        made = [x.new_empty(s) for x, s in zip([example] if one else example, shapes, strict=True)]
    new.meta["val"] = made[0] if one else type(example)(made)


def _smaller(example: Tensor, axes: list[Tensor]) -> list[Any]:
    """Return the sizes of what stays."""
    sizes: list[Any] = list(example.shape)
    for axis, along in enumerate(axes):
        if not along.all():
            sizes[axis] = fewer(sizes[axis], along)
    return sizes


def _narrow_state(edit: GraphEdit, node: fx.Node, axes: list[Tensor]) -> None:
    for state in edit.program.states:
        if state.placeholder == node.name:
            sizes = list(state.shape)
            for axis, along in enumerate(axes):
                if not along.all() and isinstance(sizes[axis], int):
                    sizes[axis] = int(along.sum())
            edit.states[state.name] = replace(state, shape=tuple(sizes))
