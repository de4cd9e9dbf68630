"""Read where a site's tokens come from: another stream, a cache, an image, pieces of one."""

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, fx

from attnopt.finder.contraction import read_contraction
from attnopt.finder.evaluate import ancestors, is_size
from attnopt.finder.layout import place
from attnopt.finder.match import Match
from attnopt.finder.ops import (
    CONTRACTIONS,
    JOINING,
    LAYOUT,
    SDPA,
    TRANSPARENT,
    args,
    kind,
    rank,
    shape,
    value,
)
from attnopt.finder.projections import Numbers, pushed
from attnopt.finder.provenance import ELEMENTWISE, View, weight_of
from attnopt.finder.walking import projecting, walk_back
from attnopt.nouns import Grid
from attnopt.ops.variants import fast_copy


def cache_inputs(view: View, start: fx.Node) -> list[fx.Node]:
    """List the states that an operand is made of without another projection in between."""

    def onward(node: fx.Node) -> Iterable[fx.Node] | None:
        if is_size(node) or kind(node) in CONTRACTIONS:
            return ()
        is_input = node.op == "placeholder"
        if is_input and view.program.bindings[node.name].kind == "state":
            return None
        return node.all_input_nodes

    return sorted(walk_back(start, onward)[1])


def piece_key(view: View, match: Match, matches: list[Match]) -> object | None:
    """Return what the pieces of one attention share: projections, and where they are joined.

    Pieces hold different queries of the same projections and are concatenated along the queries.
    """
    if sum(m.module == match.module for m in matches) < 2:
        return None
    sizes = shape(match.result)
    heads = place(match.result_layout, "H", sizes) + place(match.result_layout, "E", sizes)
    channels: dict[fx.Node, Numbers] = {match.result: heads}
    todo = [match.result]
    while todo and len(channels) < 40:
        node = todo.pop(0)
        for user in sorted(node.users):
            if kind(user) in JOINING:
                axis = (args(user)[1] if len(args(user)) > 1 else 0) % rank(user)
                if not _varies(channels[node], axis):
                    return (match.module, user, projecting(view, match.q.product))
            elif user not in channels and kind(user) in TRANSPARENT | LAYOUT:
                moved = pushed(view, user, node, channels[node])
                if moved is not None:
                    channels[user] = moved
                    todo.append(user)
    return None


def _varies(numbers: Numbers, axis: int) -> bool:
    assert isinstance(numbers, Tensor)
    return bool((numbers != numbers.narrow(axis, 0, 1)).any())


def site_kind(view: View, match: Match, mask_kind: str) -> Literal["self", "cross"]:
    """Tell whether queries attend to their own tokens."""
    if mask_kind in ("causal", "sliding", "chunked", "prefix"):
        return "self"
    return kind_of(view, match.q.product, match.k.product)


def kind_of(view: View, queries: fx.Node, keys: fx.Node) -> Literal["self", "cross"]:
    """Tell whether queries and keys are made from one stream of tokens."""
    return "self" if stream(view, queries) & stream(view, keys) else "cross"


def stream(view: View, node: fx.Node) -> frozenset[fx.Node]:
    """Walk back from an operand to the token stream: a residual sum, an embedding or an input."""
    return walk_back(node, lambda n: _upstream(view, n))[1]


def _upstream(view: View, node: fx.Node) -> list[fx.Node] | None:
    """Return what a node passes on; None at a node of the token stream."""
    name = kind(node)
    origins = view.origins
    data = [n for n in node.all_input_nodes if origins.is_data(n)]
    if not data and origins.is_projected(node):
        data = [n for n in node.all_input_nodes if "parameter" in origins.of(n)][:1]
    if node.op == "placeholder" or name in ("embedding", "", *SDPA) or not data:
        return None
    if fast_copy(node) is not None:
        return None
    if name in JOINING:
        fresh = [n for n in data if "state" not in origins.of(n) or "parameter" in origins.of(n)]
        return fresh or None
    if name in ("add", "sub") and len(data) > 1:
        return None if not _same_source(data) else data
    contraction = read_contraction(node)
    if name in CONTRACTIONS or contraction is not None:
        return data if contraction and weight_of(contraction, origins) is not None else None
    return data


def _same_source(parts: list[fx.Node]) -> bool:
    """Tell two turned copies of one tensor from a residual sum: they meet within a few steps."""
    near = [_near(p) for p in parts]
    return bool(frozenset.intersection(*near))


def _near(node: fx.Node, steps: int = 8) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    layer = {node}
    for _ in range(steps):
        found |= layer
        layer = {
            m for n in layer for m in n.all_input_nodes
            if kind(n) in ELEMENTWISE | LAYOUT | JOINING | TRANSPARENT and not is_size(m)
            and isinstance(value(m), Tensor) and m.op != "placeholder"
        }  # fmt: skip
    return frozenset(n for n in found if kind(n) not in ("", "cos", "sin", "unsqueeze"))


def grid(view: View, match: Match) -> Grid | None:
    """Find the image that the queries come from: a convolution's height x width."""
    tokens = match.q.layout.size("T")
    for n in reversed(ancestors([match.q.product])):
        if kind(n) == "conv2d" and rank(n) == 4:
            height, width = shape(n)[-2:]
            leading = tokens - height * width
            if 0 <= leading < min(16, height * width) and height * width > 1:
                return Grid(height, width, leading)
    return None
