"""The terms that masks and biases are sums of, and the masks that are written over data."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from attnopt.finder.evaluate import ancestors
from attnopt.finder.layout import Layout
from attnopt.finder.match import Side
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, argument, kind, shape, value
from attnopt.finder.scores import HARD

_BROADCASTING = frozenset(
    "expand expand_as unsqueeze slice view reshape broadcast_to to _to_copy".split()
)


@dataclass(frozen=True)
class Term:
    """A part of what is added to, or hides, the scores.

    `under` is what data decide, where this term only writes a mask over it.
    """

    node: fx.Node
    op: str
    when: bool
    factor: float
    layout: Layout
    under: fx.Node | None = None

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """Return where the term's own subgraph ends: at what the mask is written over."""
        return () if self.under is None else (self.under,)

    def is_hard(self, numbers: Tensor) -> Tensor:
        """Tell which numbers hide: as they are written, or as they are multiplied after it."""
        return numbers * math.copysign(max(abs(self.factor), 1.0), self.factor) <= HARD

    def nodes(self) -> list[fx.Node]:
        """List the term's own subgraph, in order of execution."""
        return [n for n in ancestors([self.node], self.ends) if n not in self.ends]


def split_terms(side: Side) -> list[Term]:
    """Split a side operand into the terms that are added up in it."""
    step = side.step
    if step.op != "add":
        return [Term(side.node, step.op, step.when, 1.0, side.layout)]
    return [Term(n, "add", True, side.factor, side.layout) for n in _summands(side.node)]


def _summands(node: fx.Node) -> list[fx.Node]:
    """Follow sums, casts and broadcasts down to the terms, each a tensor that broadcasts."""
    inner = node
    while kind(inner) in _BROADCASTING | TRANSPARENT and isinstance(args(inner)[0], fx.Node):
        if kind(inner) in LAYOUT and not _keeps_axes(inner):
            break
        inner = args(inner)[0]
    if kind(inner) == "add" and argument(inner, 2, "alpha", 1) == 1:
        parts = [a for a in args(inner)[:2] if isinstance(a, fx.Node)]
        if len(parts) == 2 and all(isinstance(value(p), Tensor) for p in parts):
            return [term for p in parts for term in _summands(p)]
    return [inner]


def _keeps_axes(node: fx.Node) -> bool:
    """Tell whether a layout op only broadcasts: its input could stand in its place."""
    before, after = shape(args(node)[0]), shape(node)
    if kind(node) == "unsqueeze" and args(node)[1] not in (0,):
        return False
    lead = len(after) - len(before)
    return lead >= 0 and all(b in (1, a) for b, a in zip(before, after[lead:], strict=True))


def fills(node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node]]:
    """List how a node may be read as (condition, what is written, over what)."""
    given = args(node)
    read = {
        "masked_fill": [(1, 2, 0)],
        "where": [(0, 1, 2), (0, 2, 1)],
    }.get(kind(node), [])
    found = [(given[c], given[f], given[o]) for c, f, o in read if len(given) == 3]
    return [x for x in found if isinstance(x[0], fx.Node) and isinstance(x[2], fx.Node)]
