"""Replace an attention by the canonical op, which computes the same thing.

What the source spelling wasted goes: repeated keys and values, detours through other layouts,
scales and masks spread over many nodes. The result equals the source within rounding, and is
proved to on random inputs before the graph is changed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from attnopt.finder.anchors import is_fused
from attnopt.finder.emit import Writer, from_canonical, to_canonical
from attnopt.finder.layout import Layout
from attnopt.finder.match import Match, Operand, Padding, Side
from attnopt.finder.ops import shape, value
from attnopt.nouns import Mask, No, Site
from attnopt.ops.structure import options_of

aten = torch.ops.aten

exact = True
tier = 0


@dataclass(frozen=True)
class Config:
    """The pass has no knobs."""


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Accept every site: what cannot be rewritten is refused when its match is read."""
    return True


def convert(site: Site, stats: Any, config: Config) -> dict[str, torch.Tensor]:
    """Return no new parameters: the weights stay as they are."""
    return {}


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV bytes per token, in units of one element; they do not change."""
    return {"kv_elements_per_token": site.kv_heads * (site.head_dim + site.v_head_dim)}


def refuse(match: Match) -> No | None:
    """Say why a match cannot become the canonical op; None where it can."""
    if match.structure.kind == "dense":
        return No(
            "it was rewritten to a variant already, which has a mask of its own", match.anchor.name
        )
    if match.reused:
        why = "the attention weights are read elsewhere, and the canonical op never forms them"
        return No(f"{why} ({', '.join(n.name for n in match.reused[:3])})", match.anchor.name)
    if is_fused(match.anchor) and match.structure.kind != "none" and not _is_square(match):
        why = "is_causal with fewer queries than keys aligns at the top left"
        return No(why, match.anchor.name)
    for side in match.sides:
        if side.step.op == "multiply" and not _per_query(side) and side.step.when is False:
            return No("the scores are divided by a tensor over the keys", side.step.node.name)
    return None


def emit(writer: Writer, match: Match) -> fx.Node:
    """Insert the canonical op and what brings operands and result to form; return the result."""
    q = _operand(writer, match.q, "BHTD")
    k = _operand(writer, match.k, "BHSD")
    v = _operand(writer, match.v, "BHSE")
    bias: fx.Node | None = None
    mask: fx.Node | None = None
    for side in match.sides:
        op = side.step.op
        if op == "multiply" and _per_query(side):
            factor = _canonical_side(writer, side, side.node)
            q = writer.call(aten.mul.Tensor if side.step.when else aten.div.Tensor, q, factor)
            bias = None if bias is None else writer.call(aten.mul.Tensor, bias, factor)
        elif op == "multiply":
            # A product with a 0/1 tensor hides what it zeroes; what is added later makes it final.
            mask = _both(writer, mask, _canonical_side(writer, side, _truth(writer, side.node)))
        elif op == "hide":
            seen = _truth(writer, side.node)
            seen = writer.call(aten.logical_not.default, seen) if side.step.when else seen
            seen = _canonical_side(writer, side, seen)
            if match.blind == "least":
                bias = _overwritten(writer, bias, seen, side)
            else:
                mask = _both(writer, mask, seen)
        else:
            term = _canonical_side(writer, side, side.node)
            term = term if side.factor == 1 else writer.call(aten.mul.Tensor, term, side.factor)
            bias = _sum(writer, bias, term)
    sinks = _sinks(writer, match.sinks)
    options: dict[str, Any] = {"scale": match.scale}
    padding = None if match.padding is None else _padding(writer, match.padding)
    named = {"bias": bias, "mask": mask, "padding": padding, "sinks": sinks}
    options.update({name: x for name, x in named.items() if x is not None})
    if match.softcap is not None:
        options["softcap"] = match.softcap
    if match.blind == "mean":
        options["mean_if_blind"] = True
    options.update(options_of(match.structure))
    for name, operand in (("k_map", match.k), ("v_map", match.v)):
        heads = operand.heads
        even = tuple(h * operand.held // len(heads) for h in range(len(heads)))
        if heads != even:
            options[name] = list(heads)
    result = writer.attention(q, k, v, options)
    return _finish(writer, match, result)


def narrow(node: fx.Node, window: Mask | None) -> None:
    """Say of a canonical op that all keys which its mask shows lie in a window."""
    if window is not None:
        node.kwargs = {**node.kwargs, **options_of(window)}


def _is_square(match: Match) -> bool:
    return match.q.layout.size("T") == match.k.layout.size("S")


def _operand(writer: Writer, operand: Operand, order: str) -> fx.Node:
    return to_canonical(writer, operand.node, operand.layout, order)


def _padding(writer: Writer, padding: Padding) -> fx.Node:
    """Return a padding input as (B, 1, 1, S) booleans, true = visible; all sites share it."""

    def write(early: Writer) -> fx.Node:
        if padding.inverted:
            seen = early.call(aten.eq.Scalar, padding.node, 0)
        else:
            seen = _truth(early, padding.node)
        return early.call(aten.unsqueeze.default, early.call(aten.unsqueeze.default, seen, 1), 1)

    return writer.shared(("padding", padding), write)


def _per_query(side: Side) -> bool:
    """Tell whether a side operand is the same for all keys."""
    return "S" not in side.own_layout().roles


def _canonical_side(writer: Writer, side: Side, node: fx.Node) -> fx.Node:
    """Bring a side operand to (B, H, T, S), axes that it broadcasts along having size 1."""
    if value(node).dim() == 0:
        return node
    own = side.own_layout()
    partial = {
        f.role for axis in own.axes for f in axis if own.size(f.role) != side.layout.size(f.role)
    }
    if partial:
        node, own = _spread(writer, side, node, partial)
    return to_canonical(writer, node, own, "BHTS")


def _spread(writer: Writer, side: Side, node: fx.Node, partial: set[str]) -> tuple[fx.Node, Layout]:
    """Expand a side operand along all axes of a role of which it covers some."""
    axes = side.layout.axes
    for _ in range(len(axes) - value(node).dim()):
        node = writer.call(aten.unsqueeze.default, node, 0)
    stage = value(side.step.node).shape
    wide = [any(f.role in partial for f in a) for a in axes]
    sizes = [writer.size(n) if w else -1 for n, w in zip(stage, wide, strict=True)]
    node = writer.call(aten.expand.default, node, sizes)
    held = zip(axes, shape(node), strict=True)
    return node, Layout(tuple(a if n > 1 else () for a, n in held))


def _truth(writer: Writer, node: fx.Node) -> fx.Node:
    """Return a node as booleans."""
    if value(node).dtype == torch.bool:
        return node
    return writer.call(aten.ne.Scalar, node, 0)


def _both(writer: Writer, a: fx.Node | None, b: fx.Node) -> fx.Node:
    return b if a is None else writer.call(aten.logical_and.default, a, b)


def _sum(writer: Writer, a: fx.Node | None, b: fx.Node) -> fx.Node:
    return b if a is None else writer.call(aten.add.Tensor, a, b)


def _overwritten(writer: Writer, bias: fx.Node | None, seen: fx.Node, side: Side) -> fx.Node:
    """Write the least number, or infinity, over what was added so far where a key is not seen."""
    dtype = value(side.step.node).dtype
    least = torch.finfo(dtype).min * min(side.factor, 1.0)
    least = least if side.step.number > -math.inf else -math.inf
    if bias is None:
        bias = writer.call(aten.zeros_like.default, seen, dtype=dtype)
    return writer.call(aten.where.ScalarOther, seen, bias, least)


def _sinks(writer: Writer, side: Side | None) -> fx.Node | None:
    """Return the sink logits, one a head."""
    if side is None:
        return None
    assert side.step.side is not None
    node = side.step.side
    sizes = shape(node)
    roles = [a if s > 1 else () for a, s in zip(side.layout.axes, sizes, strict=True)]
    # The column is the same for every batch row and query, or the proof fails.
    for axis, factors in enumerate(roles):
        if factors and all(f.role != "H" for f in factors):
            node = writer.call(aten.slice.Tensor, node, axis, 0, 1)
    kept = Layout(tuple(f if any(x.role == "H" for x in f) else () for f in roles))
    four = to_canonical(writer, node, kept, "BHTS")
    return writer.call(aten.reshape.default, four, [-1])


def _finish(writer: Writer, match: Match, result: fx.Node) -> fx.Node:
    """Apply what the source did to the weights, then bring the result to the source's layout."""
    if match.after_scale != 1:
        result = writer.call(aten.mul.Tensor, result, match.after_scale)
    for side in match.after:
        if not _per_query(side):
            continue
        if side.step.op == "multiply":
            result = writer.call(aten.mul.Tensor, result, _canonical_side(writer, side, side.node))
        elif side.step.op == "zero":
            kept = _truth(writer, side.node)
            kept = writer.call(aten.logical_not.default, kept) if side.step.when else kept
            factor = _canonical_side(writer, side, kept)
            result = writer.call(aten.mul.Tensor, result, factor)
    product = value(match.result)
    final = from_canonical(writer, result, match.result_layout, "BHTE", list(product.shape))
    if value(final).dtype != product.dtype:
        final = writer.call(aten.to.dtype, final, product.dtype)
    return final
