"""Say which softmaxes are pieces of one attention."""

from collections.abc import Mapping

from torch import fx

from attnopt.finder import facts
from attnopt.finder.anchors import Anchor
from attnopt.finder.assembled import Reading, read_factor
from attnopt.finder.contraction import read_contraction
from attnopt.finder.evaluate import is_size
from attnopt.finder.match import Match
from attnopt.finder.ops import CONTRACTIONS, kind
from attnopt.finder.provenance import View, weight_of
from attnopt.finder.walking import projecting
from attnopt.nouns import No

Piece = Match | Reading


_FACTOR = "its weights are multiplied with those of other softmaxes"


def group(
    view: View, pieces: list[Piece], anchors: Mapping[fx.Node, Anchor]
) -> list[tuple[Piece, ...]]:
    """Group pieces that share queries, keys and values of one module, in order of execution."""
    matches = [p for p in pieces if isinstance(p, Match)]
    met = _meeting(view, matches, anchors)
    assembled = {_queries(view, p) for p in pieces if isinstance(p, Reading)}
    found: dict[object, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda p: p.anchor):
        key: object = _queries(view, piece) if assembled else None
        if isinstance(piece, Match) and (key is None or key not in assembled):
            key = met.get(piece.anchor) or facts.piece_key(view, piece, matches) or piece.anchor
        factor = read_factor(view, anchors[piece.anchor], _FACTOR) if piece.anchor in met else piece
        found.setdefault(key, []).append(piece if isinstance(factor, No) else factor)
    return [tuple(pieces) for pieces in found.values()]


def _queries(view: View, piece: Piece) -> tuple[str, frozenset[fx.Node]]:
    """Return the module of a piece, and what projects its queries."""
    if isinstance(piece, Match):
        return piece.module, projecting(view, piece.q.product)
    return piece.module, projecting(view, piece.q.node)


def _meeting(
    view: View, matches: list[Match], anchors: Mapping[fx.Node, Anchor]
) -> dict[fx.Node, fx.Node]:
    """Map softmaxes whose weights meet in a product to the first of them.

    They are factors of one matrix of weights, as in Nystrom attention, unless the scores of one
    are made from the other's result.
    """
    modules = [m.module for m in matches]
    several = [
        anchors[m.anchor] for m in matches if m.anchor in anchors and modules.count(m.module) > 1
    ]
    reached = {a.weights: _reached(view, a, several) for a in several}
    first: dict[fx.Node, fx.Node] = {}
    for i, a in enumerate(several):
        for b in several[:i]:
            mine, other = reached[a.weights], reached[b.weights]
            dependent = a.scores in other or b.scores in mine
            if not dependent and any(_meet(n, mine, other) for n in mine & other):
                root = first.setdefault(b.weights, b.weights)
                old = first.get(a.weights, a.weights)
                first = {n: root if r is old else r for n, r in first.items()} | {a.weights: root}
    return first


def _meet(node: fx.Node, mine: set[fx.Node], other: set[fx.Node]) -> bool:
    c = read_contraction(node) if kind(node) in CONTRACTIONS else None
    if c is None:
        return False
    lhs, rhs = c.lhs, c.rhs
    return (lhs in mine - other and rhs in other) or (rhs in mine - other and lhs in other) or (
        lhs in other - mine and rhs in mine) or (rhs in other - mine and lhs in mine)  # fmt: skip


def _reached(view: View, anchor: Anchor, others: list[Anchor]) -> set[fx.Node]:
    """List what weights reach without another softmax or projection in between."""
    ends = {a.weights for a in others}
    found = {anchor.weights}
    todo = [anchor.weights]
    while todo:
        for user in todo.pop().users:
            contraction = read_contraction(user)
            learned = contraction is not None and weight_of(contraction, view.origins) is not None
            if user not in found | ends and not learned and not is_size(user):
                found.add(user)
                todo.append(user)
    return found
