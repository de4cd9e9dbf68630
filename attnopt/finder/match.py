"""A match: queries, keys, values, scores and result, each with the roles of its axes."""

from dataclasses import dataclass
from typing import Literal

from torch import fx

from attnopt.finder.anchors import Step
from attnopt.finder.contraction import Contraction, Labels
from attnopt.finder.layout import Layout
from attnopt.finder.ops import (
    shape,
)
from attnopt.nouns import Mask

NO_MASK = Mask("none")

Blind = Literal["zeros", "mean", "least"]
"""What a query that sees no key gives: zeros, the mean of all values, or what the softmax makes of
scores of which the hidden ones are the least number, as where several masks are added up."""


@dataclass(frozen=True)
class Operand:
    """A tensor with its layout; `heads[h]` is its own head that query head h reads.

    `count` heads are distinct; the tensor may hold more where a repetition could not be undone.
    """

    node: fx.Node
    layout: Layout
    heads: tuple[int, ...]
    product: fx.Node
    count: int
    labels: Labels = ()

    @property
    def held(self) -> int:
        """Return the number of heads that the tensor holds, repeated ones included."""
        return max(self.heads) + 1


@dataclass(frozen=True)
class Side:
    """A side operand of the scores or the weights, with the layout of the stage that it joins."""

    step: Step
    layout: Layout
    factor: float = 1.0

    @property
    def node(self) -> fx.Node:
        """Return the side operand's node."""
        assert self.step.side is not None
        return self.step.side

    def own_layout(self) -> Layout:
        """Return the layout of the side operand itself; what it broadcasts along has no role."""
        sizes = shape(self.node)
        axes = self.layout.axes[len(self.layout.axes) - len(sizes) :]
        return Layout(tuple(a if s > 1 else () for a, s in zip(axes, sizes, strict=True)))


@dataclass(frozen=True)
class Padding:
    """An input (B, S) that hides keys: its ones are visible, or with `inverted` its zeros."""

    node: fx.Node
    inverted: bool


@dataclass(frozen=True)
class Rows:
    """The scores that become weights along an axis; the layout is that of their queries."""

    scores: fx.Node
    axis: int
    layout: Layout


@dataclass(frozen=True)
class Match:
    """One attention, read: result = softmax(cap(q k * scale) + sides, masked) v.

    `structure` and `padding` hide keys beside what the sides hide. A query that sees no key is
    blind: see `Blind`. What is `assembled` from pieces is proved at more than one size.
    """

    module: str
    anchor: fx.Node
    result: fx.Node
    result_layout: Layout
    q: Operand
    k: Operand
    v: Operand
    scale: float
    softcap: float | None
    sides: tuple[Side, ...]
    sinks: Side | None
    after: tuple[Side, ...]
    after_scale: float
    structure: Mask
    reused: tuple[fx.Node, ...]
    scores_layout: Layout
    contraction: Contraction
    padding: Padding | None = None
    blind: Blind = "zeros"
    assembled: bool = False
    rows: Rows | None = None

    @property
    def heads(self) -> int:
        """Return the number of query heads."""
        return len(self.k.heads)


@dataclass(frozen=True)
class Parts:
    """What the walks found, before any axis has a role."""

    anchor: fx.Node
    result: fx.Node
    scores: fx.Node
    axis: int
    query_key: Contraction
    steps: tuple[Step, ...]
    values: Contraction
    weights: fx.Node | None
    after: tuple[Step, ...]
    reused: tuple[fx.Node, ...]
    structure: Mask = NO_MASK
    moved: tuple[Step, ...] = ()
