"""Read attention whose scores are assembled from pieces: bands, blocks, buckets, global tokens.

Slices of several products are written into one tensor, padded, skewed or picked by an index that
data decide. No list of steps reads that, so it is read by structure: where the elements of queries,
keys and values come from, and which of them meet in each score. `exact` refuses it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.finder.blurred import Blurred, aligned, inside
from attnopt.finder.contraction import Contraction, Labels
from attnopt.finder.evaluate import ancestors
from attnopt.finder.ops import module_path
from attnopt.finder.pieces import Between, trace_between
from attnopt.finder.provenance import Root, View
from attnopt.finder.scores import Anchor
from attnopt.finder.structures import name_structure
from attnopt.nouns import Mask, No

_LARGEST = 1 << 24


@dataclass(frozen=True)
class Held:
    """An operand, its root, and the channels of the root that each head holds."""

    node: fx.Node
    labels: Labels
    root: Root
    heads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reading:
    """An attention read by structure, and `why` it was not read element by element."""

    between: Between
    origin: Blurred
    q: Held
    k: Held
    v: Held
    mask: Mask
    why: str

    @property
    def anchor(self) -> fx.Node:
        """Return the weights."""
        return self.between.anchor.weights

    @property
    def module(self) -> str:
        """Return the dotted path of the module that normalises the scores."""
        return module_path(self.anchor)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Return what the attention reads: queries, keys, values, and what enters the scores."""
        products = [x for c in self.between.products for x in (c.lhs, c.rhs)]
        values = [x for _, x in self.between.values]
        return tuple(dict.fromkeys([*products, *values, *self.between.sides]))


def match_assembled(view: View, anchor: Anchor, why: No) -> Reading | No:
    """Read scores that are written together from pieces; else return `why` nothing else fits."""
    found = trace_between(view, anchor)
    if isinstance(found, No) or not found.written:
        return why
    return _Reader(view, found).read(f"its scores are assembled from pieces ({why})")


def read_factor(
    view: View, anchor: Anchor, why: str, visible: Tensor | None = None
) -> Reading | No:
    """Read by structure what could be read element by element alone, but is a part of a whole.

    `visible` tells which scores no mask hides, for a mask that blocks of queries make.
    """
    found = trace_between(view, anchor)
    return found if isinstance(found, No) else _Reader(view, found, visible).read(why)


class _RefusalError(Exception):
    """Carries a refusal out of nested reading code to `_Reader.read`."""


class _Reader:
    """Follows the numbers of one piece's operands to its scores."""

    def __init__(self, view: View, between: Between, visible: Tensor | None = None) -> None:
        self.view = view
        self.visible = visible
        self.between = between
        self.origin = Blurred(view)

    def read(self, why: str) -> Reading | No:
        """Read operands and mask."""
        try:
            sides = [self._sides(c) for c in self.between.products]
            if self._is_too_large():
                return Reading(
                    self.between, self.origin, *sides[0], self._values(), Mask("dense"), why
                )
            swapped = self._swapped(sides)
            q, k = sides[0][::-1] if swapped else sides[0]
            v = self._values()
            mask = self._mask(sides, swapped=swapped)
            return Reading(self.between, self.origin, q, k, v, mask, why)
        except _RefusalError as refused:
            return No(str(refused), self.between.anchor.weights.name)

    def _is_too_large(self) -> bool:
        """Tell whether numbering every score takes too much memory: queries come first then."""
        scores = self.between.anchor.scores
        return math.prod(self.view.shapes.shape(scores, self.origin.sizes)) > _LARGEST

    def _sides(self, c: Contraction) -> tuple[Held, Held]:
        return (
            self._held(c.lhs, c.lhs_labels, c.summed),
            self._held(c.rhs, c.rhs_labels, c.summed),
        )

    def _held(
        self, node: fx.Node, labels: Labels, channels: Labels, *, summed_over: bool = True
    ) -> Held:
        """Read which channels of its projection an operand's heads hold."""
        numbers = self.origin.numbers(node)
        summed = [labels.index(x) for x in channels]
        rest = [i for i in range(len(labels)) if i not in summed]
        width = math.prod(numbers.shape[i] for i in summed)
        lines = numbers.permute(*rest, *summed).reshape(-1, width)
        known = lines[(lines >= 0).all(1)]
        if not known.numel():
            raise _RefusalError("nothing is known of where an operand comes from")
        root = self.origin.root_of(int(known[-1, 0]))
        known = known[inside(root, known).all(1)]
        row, channel = root.place(known)
        if summed_over and (not known.numel() or (row != row[:, :1]).any()):
            raise _RefusalError("the product sums over tokens, not over channels")
        heads = torch.unique(channel, dim=0) if root.channels else channel[:1]
        return Held(node, labels, root, tuple(tuple(h) for h in heads.tolist()))

    def _values(self) -> Held:
        for c, operand in self.between.values:
            weights = c.lhs_labels if operand is c.rhs else c.rhs_labels
            labels = c.labels(operand)
            own = tuple(x for x in labels if x not in weights)
            if own:
                return self._held(operand, labels, own, summed_over=False)
        raise _RefusalError("the weights meet no values with channels of their own")

    def _rows(self, c: Contraction, held: Held) -> Tensor:
        """Number the token of an operand that each element of a product comes from."""
        numbers = self.origin.numbers(held.node)
        for axis in reversed([i for i, x in enumerate(held.labels) if x in c.summed]):
            numbers = numbers.select(axis, 0)
        labels = tuple(x for x in held.labels if x not in c.summed)
        rows = torch.where(inside(held.root, numbers), held.root.place(numbers)[0], -1)
        shape = self.view.shapes.shape(c.node, self.view.shapes.captured)
        return aligned(rows, labels, c, shape)

    def _at_scores(self, sides: list[tuple[Held, Held]], which: int) -> Tensor:
        """Bring the tokens of the left or right operands of all products to the scores."""
        products = self.between.products
        given = {c.node: self._rows(c, s[which]) for c, s in zip(products, sides, strict=True)}
        self.scores = Blurred(self.view, given)
        rows = self.scores.numbers(self.between.anchor.scores)
        return rows.movedim(self.between.anchor.axis, -1)

    def _swapped(self, sides: list[tuple[Held, Held]]) -> bool:
        """Tell whether the right operands hold the queries: one query a row of scores."""
        self.rows = [self._at_scores(sides, which) for which in (0, 1)]
        count = [int(torch.tensor(s.root.shape).prod()) for s in sides[0]]
        self.seen = (self.rows[0] >= 0) & (self.rows[1] >= 0)
        self.seen &= (self.rows[0] < count[0]) & (self.rows[1] < count[1])
        if self.visible is not None:
            self.seen &= self.visible.movedim(self.between.anchor.axis, -1)
        for which in (0, 1):
            low = self.rows[which].masked_fill(~self.seen, 1 << 60).amin(-1)
            high = self.rows[which].masked_fill(~self.seen, -1).amax(-1)
            if bool((low >= high).all()):
                return which == 1
        raise _RefusalError("the softmax does not run over keys alone")

    def _mask(self, sides: list[tuple[Held, Held]], *, swapped: bool) -> Mask:
        """Name which keys the queries see, where positions decide it."""
        q, k = sides[0][::-1] if swapped else sides[0]
        q_rows, k_rows = (self.rows[i][self.seen] for i in ((1, 0) if swapped else (0, 1)))
        lost = self.origin.lost | self.scores.lost
        region = ancestors([self.between.anchor.scores], [q.root.node, k.root.node])
        one = len({s.root.node for pair in sides for s in pair}) <= 2
        if lost & set(region) or not one or q.root.shape != k.root.shape:
            return Mask("dense")
        sizes = [n for i, n in enumerate(q.root.shape) if i not in q.root.channels]
        at = [torch.unravel_index(r, sizes) for r in (q_rows, k_rows)]
        tokens = [i for i in range(len(sizes)) if not torch.equal(at[0][i], at[1][i])]
        if len(tokens) != 1:
            return Mask("dense")
        count = sizes[tokens[0]]
        visible = torch.zeros(count, count, dtype=torch.bool)
        visible[at[0][tokens[0]], at[1][tokens[0]]] = True
        return name_structure([visible])
