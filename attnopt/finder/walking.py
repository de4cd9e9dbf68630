"""Walk back from an operand to where it is made: its projection, its path, its ends."""

from collections.abc import Callable, Iterable

from torch import fx

from attnopt.finder.contraction import read_contraction
from attnopt.finder.evaluate import is_size
from attnopt.finder.match import Operand
from attnopt.finder.provenance import View, weight_of

Onward = Callable[[fx.Node], Iterable[fx.Node] | None]


def walk_back(start: fx.Node, onward: Onward) -> tuple[list[fx.Node], frozenset[fx.Node]]:
    """Return the nodes that a walk passes, in order of execution, and those where it ends.

    `onward` gives the nodes to visit next; None at an end.
    """
    passed: set[fx.Node] = set()
    ends: set[fx.Node] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        if node in passed or node in ends:
            continue
        later = onward(node)
        if later is None:
            ends.add(node)
        else:
            passed.add(node)
            todo.extend(later)
    return sorted(passed), frozenset(ends)


def is_projection(view: View, node: fx.Node) -> bool:
    """Tell whether a node multiplies by a learned weight."""
    contraction = read_contraction(node)
    return contraction is not None and weight_of(contraction, view.origins) is not None


def path(view: View, operand: Operand) -> list[fx.Node]:
    """List the nodes between the projection of an operand and the operand, in order."""
    roots = {r.node for r in view.provenance.roots}

    def onward(node: fx.Node) -> Iterable[fx.Node] | None:
        if node is not operand.product and (node in roots or is_projection(view, node)):
            return None
        return () if is_size(node) else node.all_input_nodes

    return walk_back(operand.product, onward)[0]


def projecting(view: View, start: fx.Node) -> frozenset[fx.Node]:
    """List the learned contractions that an operand comes from, the nearest ones only."""

    def onward(node: fx.Node) -> Iterable[fx.Node] | None:
        if is_projection(view, node):
            return None
        return () if is_size(node) else node.all_input_nodes

    return walk_back(start, onward)[1]
