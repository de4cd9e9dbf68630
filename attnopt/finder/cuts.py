"""Attention of which a graph holds only a part, because something cut the graph within it."""

from collections.abc import Iterator

from torch import fx

from attnopt.finder.anchors import Anchor, find_anchors
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, kind, module_path, rank
from attnopt.finder.provenance import View
from attnopt.finder.scores import Walker
from attnopt.finder.weights import forth
from attnopt.nouns import NearMiss, No
from attnopt.program import Program

_BEFORE = "its scores are made outside this graph, which was cut within the attention"
_AFTER = "its weights meet the values outside this graph, which was cut within the attention"


def find_cuts(program: Program) -> tuple[NearMiss, ...]:
    """List the normalisations of scores whose attention begins or ends in another graph."""
    return tuple(_cuts(program))


def _cuts(program: Program) -> Iterator[NearMiss]:
    view = View(program)
    walker = view.scalars = Walker(view)
    inputs = {name for name, b in program.bindings.items() if b.kind == "input"}
    for anchor in find_anchors(program.graph):
        if not anchor.weights.users:
            continue
        trail, way = walker.back(anchor.scores), forth(view, anchor)
        if isinstance(trail, No) and trail.where in inputs and (way or _like_scores(anchor)):
            yield NearMiss(module_path(anchor.weights), anchor.weights.name, _BEFORE)
        elif trail and not way and _is_returned(anchor):
            yield NearMiss(module_path(anchor.weights), anchor.weights.name, _AFTER)


def _like_scores(anchor: Anchor) -> bool:
    """Tell scores of heads from those of classes, whatever becomes of their weights."""
    return rank(anchor.scores) > 3 and anchor.axis == rank(anchor.scores) - 1


def _is_returned(anchor: Anchor) -> bool:
    """Tell whether the weights leave the graph, with another layout perhaps."""
    todo: list[fx.Node] = [anchor.weights]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.op == "output":
                return True
            if kind(user) in TRANSPARENT | LAYOUT and args(user)[0] is node:
                todo.append(user)
    return False
