"""Read the facts of a site that was read by structure."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from attnopt.finder import facts
from attnopt.finder.assembled import Held, Reading
from attnopt.finder.blurred import Blurred, aligned, inside
from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.ops import kind
from attnopt.finder.pieces import CARRYING, Between, carried, own_factor
from attnopt.finder.projections import columns, parameter_rows
from attnopt.finder.provenance import View, weight_of
from attnopt.nouns import Mask, Projection, Site


def read_assembled_site(view: View, readings: list[Reading], name: str, *, softmaxes: int) -> Site:
    """Read the facts of a site of one or several pieces."""
    q, k, v = (_projected(held) for held in zip(*((r.q, r.k, r.v) for r in readings), strict=True))
    first = next(r for r in readings if r.q is q)
    factor = first.between.factor
    scale = (
        None if factor is None else factor * _scale(first.origin, q) * _scale(first.origin, first.k)
    )
    sides = [n for r in readings for n in _entering(r.between)]
    alone = len(readings) == softmaxes == 1
    notes = [first.why]
    if not alone:
        notes.append(f"{softmaxes} softmaxes over parts of one attention")
    return Site(
        name=name,
        module=first.module,
        kind=facts.kind_of(view, first.q.node, first.k.node),
        heads=len(q.heads),
        kv_heads=max(len(k.heads), len(v.heads)),
        head_dim=len(q.heads[0]),
        v_head_dim=len(v.heads[0]),
        scale=scale,
        mask=first.mask if alone else Mask("dense"),
        padded=any("mask" in view.origins.of(n) for n in sides),
        bias="none",
        softcap=None,
        sinks=False,
        rope=None,
        qk_norm=None,
        cached=False,
        grid=None,
        projections=_projections(view, readings, q, k, v),
        notes=tuple(notes),
    )


def _projected(held: Iterable[Held]) -> Held:
    """Choose the operand that shows most of its projection."""
    return max(held, key=lambda h: (h.root.contraction is not None, len(h.heads)))


def _entering(between: Between) -> list[fx.Node]:
    """List what enters the scores and the weights besides queries, keys and values."""
    found = list(between.sides)
    for node in between.anchor.weights.users:
        found.extend(n for n in node.all_input_nodes if kind(node) == "masked_fill")
    return found


def _scale(origin: Blurred, held: Held) -> float:
    """Multiply the constants between a projection and an operand."""
    factor, node = 1.0, held.node
    while node is not held.root.node:
        factor *= own_factor(node)
        sources = origin.sources(node)
        if not sources:
            break
        node = sources[-1]
    return factor


def _projections(
    view: View, readings: list[Reading], q: Held, k: Held, v: Held
) -> dict[str, Projection]:
    found: dict[str, Projection] = {}
    for name, held in (("q", q), ("k", k), ("v", v)):
        if held.root.contraction is not None:
            projection = parameter_rows(view, held.root, held.heads)
            if projection is not None:
                found[name] = projection
    if len(v.heads) == len(q.heads):
        output = next((o for r in readings if (o := _output(view, r))), None)
        if output is not None:
            found["o"] = output
    return found


def _output(view: View, reading: Reading) -> Projection | None:
    """Follow the head and channel of each result to the parameter that reads them."""
    v = reading.v
    width = len(v.heads[0])
    place = torch.full((1 + max(max(h) for h in v.heads),), -1)
    for i, head in enumerate(v.heads):
        place[list(head)] = torch.arange(width) + i * width
    given: dict[fx.Node, Tensor] = {}
    sizes = reading.origin.sizes
    for c, operand in reading.between.values:
        numbers = reading.origin.numbers(operand)
        if not inside(v.root, numbers).any():
            continue
        channel = v.root.place(numbers)[1].clamp(0, len(place) - 1)
        held = torch.where(inside(v.root, numbers), place[channel], -1)
        labels = c.labels(operand)
        for x in c.summed:
            held = held.amax(labels.index(x), keepdim=True)
        kept = tuple(x for x in labels if x not in c.summed)
        held = held.squeeze([i for i, x in enumerate(labels) if x in c.summed])
        given[c.node] = aligned(held, kept, c, view.shapes.shape(c.node, sizes))
    after = Blurred(view, given, sizes)
    for node, operand in _read_next(view, given):
        held = after.numbers(operand)
        # Tokens that were written over hold other numbers.
        held = held.masked_fill(held >= len(v.heads) * width, -1)
        return columns(view, node, operand, [held], len(v.heads), width)
    return None


def _read_next(view: View, starts: Iterable[fx.Node]) -> Iterator[tuple[Contraction, fx.Node]]:
    """Yield the products with learned weights that read what comes after some nodes."""
    todo = list(starts)
    seen = set(todo)
    while todo:
        node = todo.pop(0)
        for user in sorted(node.users):
            contraction = read_contraction(user)
            if contraction is not None and weight_of(contraction, view.origins) is not None:
                yield contraction, node
            elif user not in seen and kind(user) in CARRYING and node in carried(user):
                seen.add(user)
                todo.append(user)
