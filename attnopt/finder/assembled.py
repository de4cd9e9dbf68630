"""Read attention whose scores are assembled from pieces: bands, blocks, buckets, global tokens.

Slices of several products are written into one tensor, padded, skewed or picked by an index that
data decide. No list of steps reads that, so it is read by structure: where the elements of queries,
keys and values come from, and which of them meet in each score. What `exact` can rewrite of it is
matched in `regions`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.finder.anchors import Anchor
from attnopt.finder.blurred import Blurred, aligned, inside
from attnopt.finder.contraction import Contraction, Labels
from attnopt.finder.evaluate import Sizes, ancestors
from attnopt.finder.ops import module_path, value
from attnopt.finder.pieces import Between, trace_between
from attnopt.finder.provenance import Root, View
from attnopt.finder.structures import name_structure
from attnopt.nouns import Mask, No

# Scores that are numbered at all (4 bytes each), and those for all rows of the batch.
_LARGEST = 3 << 27
_LARGE = 1 << 24
# Scores whose queries and keys are compared at a time.
_PORTION = 1 << 24
_ENDLESS = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Held:
    """An operand, its root, and the channels of the root that each head holds."""

    node: fx.Node
    labels: Labels
    root: Root
    heads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Reading:
    """An attention read by structure, and `why` it was not read element by element.

    `pairs` are the queries and keys of each product, where every score was numbered.
    """

    between: Between
    origin: Blurred
    q: Held
    k: Held
    v: Held
    mask: Mask
    why: str
    pairs: tuple[tuple[Held, Held], ...] = ()

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
        self.sizes = view.shapes.captured if visible is not None else _affordable(view, between)
        self.origin = Blurred(view, sizes=self.sizes)

    def read(self, why: str) -> Reading | No:
        """Read operands and mask."""
        try:
            sides = [self._sides(c) for c in self.between.products]
            if self._is_too_large():
                return Reading(
                    self.between, self.origin, *sides[0], self._values(), Mask("dense"), why
                )
            swapped = self._swapped(sides)
            pairs = tuple((k, q) if swapped else (q, k) for q, k in sides)
            q, k = pairs[0]
            v = self._values()
            mask = self._mask(sides, swapped=swapped)
            return Reading(self.between, self.origin, q, k, v, mask, why, pairs)
        except _RefusalError as refused:
            return No(str(refused), self.between.anchor.weights.name)

    def _is_too_large(self) -> bool:
        """Tell whether numbering every score takes too much memory: queries come first then."""
        scores = self.between.anchor.scores
        return math.prod(self.view.shapes.shape(scores, self.sizes)) > _LARGEST

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
        shape = self.view.shapes.shape(c.node, self.sizes)
        return aligned(rows.to(torch.int32), labels, c, shape)

    def _at_scores(self, sides: list[tuple[Held, Held]], which: int) -> Tensor:
        """Bring the tokens of the left or right operands of all products to the scores."""
        products = self.between.products
        given = {c.node: self._rows(c, s[which]) for c, s in zip(products, sides, strict=True)}
        self.scores = Blurred(self.view, given, self.sizes)
        rows = self.scores.numbers_alone(self.between.anchor.scores)
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
            low = self.rows[which].masked_fill(~self.seen, _ENDLESS).amin(-1)
            high = self.rows[which].masked_fill(~self.seen, -1).amax(-1)
            if bool((low >= high).all()):
                return which == 1
        raise _RefusalError("the softmax does not run over keys alone")

    def _mask(self, sides: list[tuple[Held, Held]], *, swapped: bool) -> Mask:
        """Name which keys the queries see, where positions decide it."""
        q, k = sides[0][::-1] if swapped else sides[0]
        lost = self.origin.lost | self.scores.lost
        region = ancestors([self.between.anchor.scores], [q.root.node, k.root.node])
        one = len({s.root.node for pair in sides for s in pair}) <= 2
        if lost & set(region) or not one or q.root.shape != k.root.shape:
            return Mask("dense")
        axes = [n for i, n in enumerate(q.root.shape) if i not in q.root.channels]
        sizes = [n for n in axes if n > 1] or [1]
        tokens = {0} if len(sizes) == 1 else self._differing(sizes, swapped=swapped)
        if len(tokens) != 1:
            return Mask("dense")
        token = tokens.pop()
        visible = torch.zeros(sizes[token], sizes[token], dtype=torch.bool)
        for at in self._meetings(sizes, swapped=swapped):
            visible[at[token]] = True
        return name_structure([visible])

    def _differing(self, sizes: list[int], *, swapped: bool) -> set[int]:
        """List the axes along which a query sees a key at another place than its own."""
        return {
            axis
            for at in self._meetings(sizes, swapped=swapped)
            for axis, (q_at, k_at) in enumerate(at)
            if not torch.equal(q_at, k_at)
        }

    def _meetings(
        self, sizes: list[int], *, swapped: bool
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield, a portion at a time, where queries and the keys they see are, axis by axis."""
        portions = zip(*(x.flatten().split(_PORTION) for x in (self.seen, *self.rows)), strict=True)
        for seen, lhs, rhs in portions:
            pair = (rhs, lhs) if swapped else (lhs, rhs)
            q, k = (_unravelled(rows[seen].long(), sizes) for rows in pair)
            yield list(zip(q, k, strict=True))


def _unravelled(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (rows,) if len(sizes) == 1 else torch.unravel_index(rows, sizes)


def _affordable(view: View, between: Between) -> Sizes:
    """Choose the sizes of the capture, with a single row of the batch if the scores are large."""
    sizes = view.shapes.captured
    shape = value(between.anchor.scores).shape
    if math.prod(view.shapes.shape(between.anchor.scores, sizes)) <= _LARGE:
        return sizes
    rows = shape[0].node.expr if isinstance(shape[0], torch.SymInt) else None
    return {symbol: 1 if symbol == rows else size for symbol, size in sizes.items()}
