"""The rotary embedding of a site: how channels pair up, and on which side of the cache it acts."""

from typing import Literal

from torch import fx

from attnopt.finder.evaluate import ancestors, is_size
from attnopt.finder.facts import cache_inputs
from attnopt.finder.match import Match
from attnopt.finder.ops import JOINING, TRANSPARENT, args, kind, rank, shape, value
from attnopt.finder.provenance import View
from attnopt.finder.walking import path
from attnopt.nouns import Rope


def rope(view: View, match: Match, cached: bool) -> Rope | None:
    """Find a rotary embedding: how channels pair, and on which side of the cache it acts."""
    nodes = path(view, match.q)
    turned = [n for n in nodes if kind(n) in ("mul", "view_as_complex") and _turns(view, n)]
    if not turned:
        return None
    style: Literal["half", "interleaved", "complex"] = "half"
    if any(kind(n) == "view_as_complex" for n in nodes):
        style = "complex"
    elif _interleaves(nodes):
        style = "interleaved"
    placement: Literal["before_cache", "after_cache", "no_cache"] = "no_cache"
    if cached:
        k_nodes = path(view, match.k)
        late = [n for n in k_nodes if kind(n) == "mul" and cache_inputs(view, n)]
        placement = "after_cache" if any(_turns(view, n) for n in late) else "before_cache"
    width = shape(turned[0])[-1]
    if kind(turned[0]) == "mul" and value(turned[0]).is_complex():
        width *= 2
    full = match.q.layout.size("D")
    halves = any(shape(n)[-1] == width for n in turned[1:]) and _in_halves(nodes, width)
    channels = min(2 * width if halves else width, full)
    return Rope(style=style, placement=placement, channels=channels)


def _turns(view: View, node: fx.Node) -> bool:
    """Tell whether a product has a side operand made of cosines and sines of positions."""
    if kind(node) != "mul":
        return False
    for side in node.all_input_nodes:
        if is_size(side) or view.origins.is_data(side):
            continue
        flags = view.origins.of(side)
        if flags and flags <= {"buffer", "constant", "position", "mask", "past_length"}:
            ops = {kind(n) for n in ancestors([side])}
            if ops & {"cos", "sin", "polar", "exp", "complex"} or _is_table(side):
                return True
        elif not flags and {kind(n) for n in ancestors([side])} & {"cos", "sin", "polar"}:
            return True
    return False


def _is_table(node: fx.Node) -> bool:
    """Tell whether a stored table is read by position."""
    ops = {kind(n) for n in ancestors([node])}
    return bool(ops & {"embedding", "index", "index_select", "gather", "slice"}) and rank(node) >= 2


def _interleaves(nodes: list[fx.Node]) -> bool:
    """Tell whether neighbours are paired: strided slices or stacked pairs."""
    for n in nodes:
        if kind(n) == "slice" and len(args(n)) > 4 and args(n)[4] == 2:
            return True
        if kind(n) == "stack" and args(n)[1:] and args(n)[1] in (-1, rank(n) - 1):
            return True
        if kind(n) == "unbind" and shape(args(n)[0])[-1] == 2:
            return True
    return False


def _in_halves(nodes: list[fx.Node], width: int) -> bool:
    """Tell whether the halves are turned apart and joined afterwards."""
    joins = [n for n in nodes if kind(n) in JOINING and isinstance(args(n)[0], list | tuple)]
    for n in joins:
        parts = [p for p in args(n)[0] if isinstance(p, fx.Node)]
        if len(parts) == 2 and all(
            kind(p) in ("add", "sub", *TRANSPARENT) and shape(p)[-1] == width for p in parts
        ):
            return True
    return False
