"""Join scores that stand side by side: one product with all keys for several with some of them.

    [w1, w2] = softmax([q k1' + b1, q k2' + b2]);  w1 v1 + w2 v2
             = softmax(q [k1, k2]' + [b1, b2]) [v1, v2]

What results can be read element by element: blocks of queries that see blocks of keys, as BigBird's
do, are rows of a batch then. The joined form is taken where it is proved equal to the source.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import fx

from attnopt import debug
from attnopt.finder.assembled import Reading
from attnopt.finder.blurred import Blurred
from attnopt.finder.contraction import Contraction, Labels
from attnopt.finder.emit import Writer
from attnopt.finder.ops import JOINING, LAYOUT, SOFTMAX, TRANSPARENT, args, argument, kind, value
from attnopt.finder.pieces import own_factor
from attnopt.finder.prove import prove_same
from attnopt.finder.provenance import View
from attnopt.finder.regions import is_passed
from attnopt.graphs import copied, drop_unused
from attnopt.nouns import No
from attnopt.program import Program

aten = torch.ops.aten

# Scores of all rows and heads that a proof forms at once.
_LARGEST = 1 << 27


@dataclass(frozen=True)
class _Piece:
    """Scores of some keys: factor * product, and what is added with a factor of its own."""

    product: Contraction
    factor: float
    added: tuple[tuple[fx.Node, float], ...]


@dataclass(frozen=True)
class _Beside:
    """Pieces beside one another, and their products with values in the order of the keys."""

    reading: Reading
    pieces: tuple[_Piece, ...]
    query: fx.Node
    values: tuple[tuple[Contraction, fx.Node], ...]
    result: fx.Node

    @property
    def inputs(self) -> list[fx.Node]:
        """Return what the joined form reads."""
        keys = [_other(p.product, self.query) for p in self.pieces]
        added = [node for p in self.pieces for node, _ in p.added]
        return list(dict.fromkeys([self.query, *keys, *added, *(v for _, v in self.values)]))


def join_pieces(view: View, readings: Sequence[Reading]) -> Program | No:
    """Return a program in which the scores of some readings are one product; No where of none."""
    beside = []
    for reading in readings:
        found = _read(view, reading)
        if isinstance(found, No):
            debug.log(4, f"the pieces of {reading.module} are not joined: {found}")
        else:
            beside.append(found)
    if not beside:
        return No("no scores stand side by side")
    graph, mapping = copied(view.program.graph)
    count = 0
    for found in beside:
        refusal = _join(view, graph, mapping, found)
        if refusal is None:
            count += 1
        else:
            debug.log(4, f"the pieces of {found.reading.module} are not joined: {refusal}")
    if not count:
        return No("no joined scores are proved")
    drop_unused(graph)
    graph.lint()
    return replace(view.program, graph_module=fx.GraphModule(view.program.graph_module, graph))


def _join(
    view: View, graph: fx.Graph, mapping: dict[fx.Node, fx.Node], beside: _Beside
) -> No | None:
    """Put the joined form in the place of the source's in a copy of the graph, if it is equal."""
    writer = Writer(graph, view.shapes, mapping[beside.result], mapping)
    try:
        result = _write(writer, beside)
    except (NotImplementedError, RuntimeError) as error:
        return No(f"cannot be written: {error}", beside.result.name)
    refusal = prove_same(view, beside.result, result, beside.inputs, mapping)
    if refusal is None:
        mapping[beside.result].replace_all_uses_with(result)
        mapping[beside.result] = result
    return refusal


class _RefusalError(Exception):
    """Carries a refusal out of nested reading code to `_read`."""


def _read(view: View, reading: Reading) -> _Beside | No:
    try:
        return _Reader(view, reading).read()
    except _RefusalError as refused:
        return No(str(refused), reading.anchor.name)


class _Reader:
    """Takes apart scores that are concatenated along the keys."""

    def __init__(self, view: View, reading: Reading) -> None:
        self.view = view
        self.reading = reading
        self.anchor = reading.between.anchor
        self.products = {c.node: c for c in reading.between.products}

    def read(self) -> _Beside:
        """Read pieces, values and result, raising `_RefusalError` where something does not fit."""
        last = len(value(self.anchor.scores).shape) - 1
        if kind(self.anchor.weights) not in SOFTMAX or self.anchor.axis != last:
            raise _RefusalError("the softmax is not one over the last axis")
        shapes = self.view.shapes
        if math.prod(shapes.shape(self.anchor.scores, shapes.captured)) > _LARGEST:
            raise _RefusalError("its scores are too many to prove")
        node, factor = self._through(self.anchor.scores, 1.0)
        axis = argument(node, 1, "dim", 0) if kind(node) in JOINING else None
        if kind(node) not in ("cat", "concat", "concatenate") or axis not in (last, -1):
            raise _RefusalError("its scores do not stand side by side")
        pieces = tuple(self._piece(n, factor) for n in args(node)[0])
        queries = [{p.product.lhs, p.product.rhs} for p in pieces]
        shared = set.intersection(*queries)
        if len(shared) != 1:
            raise _RefusalError("its pieces have queries of their own")
        query = shared.pop()
        for piece in pieces:
            _check(piece.product, query, _other(piece.product, query))
        values = tuple(self._values())
        result = self._sum([c.node for c, _ in values])
        if not is_passed(self.anchor.weights, result):
            raise _RefusalError("its weights are read elsewhere")
        return _Beside(self.reading, pieces, query, values, result)

    def _through(self, node: fx.Node, factor: float) -> tuple[fx.Node, float]:
        """Step back over casts and products with numbers."""
        while True:
            step = own_factor(node)
            if kind(node) in TRANSPARENT and value(node).dtype == value(args(node)[0]).dtype:
                node = args(node)[0]
            elif step != 1.0:
                node, factor = args(node)[0], factor * step
            else:
                return node, factor

    def _piece(self, node: fx.Node, factor: float) -> _Piece:
        """Read one piece: sums around a product."""
        added: list[tuple[fx.Node, float]] = []
        while True:
            node, factor = self._through(node, factor)
            if node in self.products:
                product = self.products[node]
                if product.addend is not None:
                    raise _RefusalError("a product adds something to itself")
                return _Piece(product, factor * product.factor, tuple(added))
            terms = [n for n in args(node)[:2] if isinstance(n, fx.Node)]
            if kind(node) != "add" or len(terms) != 2 or node.kwargs:
                raise _RefusalError(f"{node.name} is no sum with a product")
            main = [n for n in terms if self.view.origins.is_data(n)]
            if len(main) != 1:
                raise _RefusalError(f"{node.name} adds what the model computes")
            added.append((terms[1 - terms.index(main[0])], factor))
            node = main[0]

    def _values(self) -> Iterator[tuple[Contraction, fx.Node]]:
        """Yield the products with values in the order of the keys, each key in one of them."""
        weights = self.anchor.weights
        shape = self.view.shapes.shape(weights, self.view.shapes.captured)
        along = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
        numbers = Blurred(self.view, {weights: along}, self.view.shapes.captured)
        found: list[tuple[int, int, Contraction, fx.Node]] = []
        for c, operand in self.reading.between.values:
            held = c.lhs if operand is c.rhs else c.rhs
            if not self._is_slice(held) or len(c.summed) != 1:
                raise _RefusalError("its weights are changed before they meet values")
            axis = c.labels(held).index(c.summed[0])
            keys = numbers.numbers(held).movedim(axis, -1)
            start, count = int(keys.min()), keys.shape[-1]
            if (keys != torch.arange(start, start + count)).any():
                raise _RefusalError("its weights are moved before they meet values")
            _check(c, held, operand)
            found.append((start, count, c, operand))
        end = 0
        for start, count, c, operand in sorted(found, key=lambda x: x[0]):
            if start != end:
                raise _RefusalError("its weights meet values twice, or never")
            end += count
            yield c, operand
        if end != shape[-1]:
            raise _RefusalError("its weights meet values twice, or never")

    def _is_slice(self, node: fx.Node) -> bool:
        """Tell whether a node is the weights, or an index map of them."""
        while node is not self.anchor.weights:
            if kind(node) not in LAYOUT | TRANSPARENT or not isinstance(args(node)[0], fx.Node):
                return False
            node = args(node)[0]
        return True

    def _sum(self, nodes: list[fx.Node]) -> fx.Node:
        """Find the node that is the sum of some others."""
        parts = dict.fromkeys(nodes, 1)
        todo = list(nodes)
        while todo:
            node = todo.pop(0)
            if parts[node] == len(nodes):
                return node
            for user in node.users:
                terms = args(user)[:2]
                plain = kind(user) == "add" and not user.kwargs and len(set(terms)) == 2
                if plain and user not in parts and all(n in parts for n in terms):
                    parts[user] = sum(parts[n] for n in terms)
                    todo.append(user)
        raise _RefusalError("its results are not added up")


def _other(c: Contraction, operand: fx.Node) -> fx.Node:
    return c.rhs if operand is c.lhs else c.lhs


def _check(c: Contraction, left: fx.Node, right: fx.Node) -> None:
    """Refuse a product that is not (..., rows of the left operand, columns of the right one)."""
    if len(c.out_labels) < 2 or len(c.summed) != 1:
        raise _RefusalError("a product has other axes")
    *batch, row, column = c.out_labels
    own, other = c.labels(left), c.labels(right)
    fits = row in own and row not in other and column in other and column not in own
    if not fits or not set(own) <= {*batch, row, *c.summed}:
        raise _RefusalError("a product has other axes")


def _write(writer: Writer, beside: _Beside) -> fx.Node:
    """Write the joined form; return its result."""
    first = beside.pieces[0]
    batch = list(value(first.product.node).shape[:-2])
    query = _matrix(writer, first.product, beside.query, batch, row=-2)
    keys = []
    for piece in beside.pieces:
        node = _other(piece.product, beside.query)
        key = _matrix(writer, piece.product, node, batch, row=-1)
        same = piece.factor == first.factor
        keys.append(key if same else writer.call(aten.mul.Tensor, key, piece.factor / first.factor))
    key = writer.call(aten.cat.default, keys, -2)
    turned = writer.call(aten.transpose.int, key, -1, -2)
    scores = writer.call(aten.matmul.default, query, turned)
    if first.factor != 1.0:
        scores = writer.call(aten.mul.Tensor, scores, first.factor)
    if any(piece.added for piece in beside.pieces):
        added = [_added(writer, piece) for piece in beside.pieces]
        scores = writer.call(aten.add.Tensor, scores, writer.call(aten.cat.default, added, -1))
    softmax: Any = beside.reading.anchor
    weights = writer.call(softmax.target, scores, *args(softmax)[1:], **softmax.kwargs)
    values = []
    for c, node in beside.values:
        if value(_other(c, node)).dtype != value(weights).dtype:
            weights = writer.call(aten.to.dtype, weights, value(_other(c, node)).dtype)
        values.append(_matrix(writer, c, node, batch, row=None))
    return writer.call(aten.matmul.default, weights, writer.call(aten.cat.default, values, -2))


def _matrix(
    writer: Writer, c: Contraction, operand: fx.Node, batch: list[Any], *, row: int | None
) -> fx.Node:
    """Bring an operand of a product to (..., tokens, channels).

    `row` is the label of its tokens among those of the product; None where they are summed over.
    """
    labels = c.labels(operand)
    last = (c.summed[0], c.out_labels[-1]) if row is None else (c.out_labels[row], c.summed[0])
    kept: Labels = tuple(x for x in c.out_labels[:-2] if x in labels)
    node = writer.mapping[operand]
    node = writer.permute(node, [labels.index(x) for x in (*kept, *last)])
    for axis, label in enumerate(c.out_labels[:-2]):
        if label not in kept:
            node = writer.call(aten.unsqueeze.default, node, axis)
    return _expanded(writer, node, [*batch, *value(node).shape[-2:]])


def _added(writer: Writer, piece: _Piece) -> fx.Node:
    """Add up what is added to the scores of a piece, as wide as they are."""
    like = value(piece.product.node)
    terms = []
    for node, factor in piece.added:
        term = writer.mapping[node]
        terms.append(term if factor == 1.0 else writer.call(aten.mul.Tensor, term, factor))
    if not terms:
        shape = [writer.size(n) for n in like.shape]
        return writer.call(aten.new_zeros.default, writer.mapping[piece.product.lhs], shape)
    total = reduce(lambda a, b: writer.call(aten.add.Tensor, a, b), terms)
    return _expanded(writer, total, list(like.shape))


def _expanded(writer: Writer, node: fx.Node, sizes: list[Any]) -> fx.Node:
    if list(value(node).shape) == sizes:
        return node
    return writer.call(aten.expand.default, node, [writer.size(n) for n in sizes])
