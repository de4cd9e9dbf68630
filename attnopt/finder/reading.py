"""Read an anchor, a fused op or a canonical op as a match."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnopt.finder.anchors import Anchor, Step, through
from attnopt.finder.assembly import assemble
from attnopt.finder.contraction import Contraction, Labels
from attnopt.finder.layout import Factor, Layout
from attnopt.finder.match import Match, Parts, Side
from attnopt.finder.ops import (
    LAYOUT,
    TRANSPARENT,
    args,
    argument,
    kind,
    rank,
    shape,
    value,
)
from attnopt.finder.provenance import View
from attnopt.finder.scores import Walker
from attnopt.finder.weights import forth
from attnopt.nouns import Mask, No
from attnopt.ops.structure import mask_of


def match_anchor(view: View, walker: Walker, anchor: Anchor) -> Match | No:
    """Read the attention around a normalisation of scores."""
    trail = walker.back(anchor.scores)
    if isinstance(trail, No):
        return trail
    way = forth(view, anchor)
    if isinstance(way, No):
        return way
    result = way.contraction.node
    others = way.others
    moved: tuple[Step, ...] = ()
    if anchor.result is not None:
        found = _divided(anchor.result, result)
        if isinstance(found, No):
            return found
        result = anchor.result
        moved = found
    parts = Parts(
        anchor=anchor.weights,
        result=result,
        scores=anchor.scores,
        axis=anchor.axis,
        query_key=trail.contraction,
        steps=trail.steps if anchor.sink is None else (*trail.steps, anchor.sink),
        values=way.contraction,
        weights=way.weights,
        after=way.steps,
        reused=others,
        moved=moved,
    )
    return assemble(view, parts)


def _divided(division: fx.Node, product: fx.Node) -> tuple[Step, ...] | No:
    """List the layout steps between the product with the values and its division by the sum."""
    node: Any = next(
        (through(a) for a in args(division)[:2] if kind(through(a)) != "reciprocal"), None
    )
    moved: list[Step] = []
    while isinstance(node, fx.Node) and node is not product:
        if kind(node) in LAYOUT - {"getitem", "gather", "index"}:
            moved.insert(0, Step("layout", node))
        elif kind(node) not in TRANSPARENT:
            break
        node = args(node)[0]
    if node is not product:
        return No(
            "the division by the sum does not follow the product with the values", division.name
        )
    return tuple(moved)


def match_fused(view: View, node: fx.Node) -> Match | No:
    """Read a scaled_dot_product_attention node."""
    q, k, v = args(node)[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    batch = tuple(f"b{i}" for i in range(rank(q) - 2))
    out = (*batch, "t", "s")
    query_key = Contraction(
        node, q, k, (*_last(batch, q), "t", "d"), (*_last(batch, k), "s", "d"), out
    )
    values = Contraction(node, node, v, out, (*_last(batch, v), "s", "e"), (*batch, "t", "e"))
    mask = argument(node, 3, "attn_mask")
    scale = argument(node, 6, "scale")
    number = float(scale) if scale is not None else shape(q)[-1] ** -0.5
    steps = [Step("scale", node, number=number)]
    if isinstance(mask, fx.Node):
        hides = value(mask).dtype == torch.bool
        steps.append(
            Step("hide", node, side=mask, number=-torch.inf, when=False)
            if hides
            else Step("add", node, side=mask)
        )
    return assemble(
        view,
        Parts(
            anchor=node,
            result=node,
            scores=node,
            axis=len(out) - 1,
            query_key=query_key,
            steps=tuple(steps),
            values=values,
            weights=None,
            after=(),
            reused=(),
            structure=Mask("causal" if argument(node, 5, "is_causal", default=False) else "none"),
        ),
    )


def _last(batch: Labels, node: fx.Node) -> Labels:
    """Return the labels of the leading axes of an operand, which line up at the right."""
    return batch[len(batch) - (rank(node) - 2) :]


def match_canonical(view: View, node: fx.Node) -> Match | No:
    """Read a canonical attention op, which says everything itself."""
    q, k, v = (n for n in args(node)[:3] if isinstance(n, fx.Node))
    out = ("b", "h", "t", "s")
    given: dict[str, Any] = dict(node.kwargs)
    scale = given.get("scale")
    steps = [Step("scale", node, number=float(shape(q)[-1] ** -0.5 if scale is None else scale))]
    cap = given.get("softcap")
    if cap is not None:
        steps += [
            Step("scale", node, number=1 / cap),
            Step("tanh", node),
            Step("scale", node, number=cap),
        ]
    bias, sinks = given.get("bias"), given.get("sinks")
    if isinstance(bias, fx.Node):
        steps.append(Step("add", node, side=bias))
    for mask in (given.get("mask"), given.get("padding")):
        if isinstance(mask, fx.Node):
            steps.append(Step("hide", node, side=mask, number=-torch.inf, when=False))
    parts = Parts(
        anchor=node,
        result=node,
        scores=node,
        axis=3,
        query_key=Contraction(node, q, k, ("b", "h", "t", "d"), ("b", "h", "s", "d"), out),
        steps=tuple(steps),
        values=Contraction(node, node, v, out, ("b", "h", "s", "e"), ("b", "h", "t", "e")),
        weights=None,
        after=(),
        reused=(),
        structure=mask_of(given),
    )
    match = assemble(view, parts)
    if isinstance(match, No):
        return match
    match = replace(match, blind="mean" if given.get("mean_if_blind") else "zeros")
    if isinstance(sinks, fx.Node):
        heads = Layout(((Factor("H", match.heads, 1),),))
        match = replace(match, sinks=Side(Step("sink", node, side=sinks), heads))
    for name, head_map in (("k", given.get("k_map")), ("v", given.get("v_map"))):
        if head_map is not None:
            operand = replace(getattr(match, name), heads=tuple(head_map))
            match = replace(match, **{name: operand})
    return match
