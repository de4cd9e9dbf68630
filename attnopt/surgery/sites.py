"""Leave some heads of an attention, or some channels of all its heads."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.calibrating import inputs_of
from attnopt.finder.emit import fake_mode_of
from attnopt.finder.match import Match
from attnopt.finder.ops import value
from attnopt.nouns import No, Site
from attnopt.surgery.edit import GraphEdit, Kept
from attnopt.surgery.nodes import narrow_line
from attnopt.surgery.selection import Selection

aten = torch.ops.aten


def narrow(
    edit: GraphEdit,
    site: Site,
    kept: Kept,
    *,
    k_map: Iterable[int] | None = None,
    v_map: Iterable[int] | None = None,
) -> No | None:
    """Leave of a site what is kept: heads, or channels of all its heads.

    `k_map` and `v_map` say which key and value head each query head reads afterwards, where that is
    not what it read before.
    """
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    output = _output_input(edit, site)
    if isinstance(output, No):
        return output
    heads = kept.q.any(1)
    if not _is_product(kept):
        return No("heads cannot keep unlike channels", site.name)
    written = torch.zeros(site.heads, site.v_head_dim, dtype=torch.bool)
    written[heads] = kept.v[kept.v.any(1)][0]
    selection = Selection(edit.view)
    selection.mark(match.q.node, match.q.layout, "BHTD", kept.q)
    selection.mark(match.k.node, match.k.layout, "BHSD", kept.k)
    selection.mark(match.v.node, match.v.layout, "BHSE", kept.v)
    selection.mark(match.result, match.result_layout, "BHTE", written)
    ends = [(match.q.node, ()), (match.k.node, ()), (match.v.node, ()), (output, (match.result,))]
    line = [n for end, stops in ends for n in selection.line(end, stops) if n is not match.result]
    last = site.projections["o"].parameter
    refusal = narrow_line(edit, selection, line, {match.anchor}, last)
    if refusal is not None:
        return No(refusal.why, f"{site.name} ({refusal.where})")
    _narrow_call(edit, match, kept, k_map, v_map)
    return None


def _is_product(kept: Kept) -> bool:
    """Whether the heads that stay keep the same channels."""
    rows = [m[m.any(1)] for m in (kept.q, kept.k, kept.v)]
    same = all(len(r) and bool((r == r[0]).all()) for r in rows)
    return same and bool(rows[0][0].sum() == rows[1][0].sum())


def _output_input(edit: GraphEdit, site: Site) -> fx.Node | No:
    """Return what the output projection of a site reads."""
    if "o" not in site.projections:
        return No("the o projection could not be mapped to columns of a parameter", site.name)
    name = site.projections["o"].parameter
    found = inputs_of(edit.program, [name]).get(name)
    return found or No(f"{name} is not multiplied with the result", site.name)


def _narrow_call(
    edit: GraphEdit,
    match: Match,
    kept: Kept,
    k_map: Iterable[int] | None,
    v_map: Iterable[int] | None,
) -> None:
    """Bring the canonical op and its side operands to the heads that stay."""
    node = edit.mapping[match.anchor]
    heads = kept.q.any(1)
    options = dict(node.kwargs)
    if options.get("scale") is None:
        options["scale"] = kept.q.shape[1] ** -0.5
    for name, given, mask in (("k_map", k_map, kept.k), ("v_map", v_map, kept.v)):
        stay = mask.any(1)
        read = list(given) if given is not None else _map_after(options.get(name), heads, stay)
        count = int(stay.sum())
        plain = [h * count // len(read) for h in range(len(read))]
        options[name] = read
        if read == plain and len(read) % count == 0:
            del options[name]
    if not heads.all():
        for name in ("bias", "mask", "sinks"):
            side = options.get(name)
            if isinstance(side, fx.Node):
                options[name] = _selected(edit, node, side, 0 if name == "sinks" else 1, heads)
    node.kwargs = options
    q, v = (value(edit.mapping[o.node]) for o in (match.q, match.v))
    with fake_mode_of((node,)):
        node.meta["val"] = value(node).new_empty((*q.shape[:3], v.shape[-1]))


def _map_after(before: Any, heads: Tensor, stay: Tensor) -> list[int]:
    """Return which head each query head that stays reads, in the numbers of those that stay."""
    count = len(heads)
    old = list(before) if before is not None else [h * len(stay) // count for h in range(count)]
    number = (stay.cumsum(0) - 1).tolist()
    return [number[old[h]] for h in range(count) if heads[h]]


def _selected(edit: GraphEdit, before: fx.Node, side: fx.Node, axis: int, stay: Tensor) -> fx.Node:
    """Insert the choice of some heads of a side operand; a size of 1 serves them all."""
    example = value(side)
    if example.dim() <= axis or example.shape[axis] == 1:
        return side
    parts: list[fx.Node] = []
    with edit.graph.inserting_before(before), fake_mode_of((side,)):
        for start, stop in _runs(stay):
            part = edit.graph.call_function(aten.slice.Tensor, (side, axis, start, stop))
            part.meta = {**side.meta, "val": aten.slice.Tensor(example, axis, start, stop)}
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        joined = edit.graph.call_function(aten.cat.default, (parts, axis))
        joined.meta = {**side.meta, "val": aten.cat.default([value(p) for p in parts], axis)}
    return joined


def _runs(stay: Tensor) -> list[tuple[int, int]]:
    """Return the stretches of what stays, as starts and ends."""
    kept = [i for i, s in enumerate(stay.tolist()) if s]
    starts = [i for i in kept if i - 1 not in kept]
    stops = [i + 1 for i in kept if i + 1 not in kept]
    return list(zip(starts, stops, strict=True))
