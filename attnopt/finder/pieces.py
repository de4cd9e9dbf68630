"""What a softmax stands between: products of activations before it, and products with others after.

Scores may be moved, joined and written into one another on the way in whatever manner.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.finder.anchors import Anchor
from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.ops import (
    CONTRACTIONS,
    JOINING,
    LAYOUT,
    TRANSPARENT,
    WRITES,
    args,
    is_number,
    is_tensor,
    kind,
    module_path,
    tensor_inputs,
)
from attnopt.finder.provenance import CONSTANT, ELEMENTWISE, View
from attnopt.nouns import No

CARRYING = TRANSPARENT | LAYOUT | JOINING | ELEMENTWISE | WRITES.keys()
_ASSEMBLING = JOINING | WRITES.keys()


@dataclass(frozen=True)
class Between:
    """A softmax over `products`, what else enters its scores, and the products with values."""

    anchor: Anchor
    products: tuple[Contraction, ...]
    sides: tuple[fx.Node, ...]
    values: tuple[tuple[Contraction, fx.Node], ...]
    factor: float | None
    written: bool


def trace_between(view: View, anchor: Anchor) -> Between | No:
    """Collect the products of two activations before a softmax, and those of its weights after."""
    before = _region(view, anchor.scores)
    values = _values(view, anchor)
    if not before.products or not values:
        return No("no softmax between products of activations", anchor.weights.name)
    factors = {round(f, 9) for _, f in before.products}
    return Between(
        anchor=anchor,
        products=tuple(dict.fromkeys(c for c, _ in before.products)),
        sides=tuple(before.sides),
        values=values,
        factor=before.products[0][1] if len(factors) == 1 else None,
        written=any(kind(n) in _ASSEMBLING for n in before.nodes),
    )


@dataclass
class _Region:
    """What lies between scores and their products."""

    nodes: list[fx.Node]
    products: list[tuple[Contraction, float]]
    sides: list[fx.Node]


def _region(view: View, scores: fx.Node) -> _Region:
    """Walk back from scores over whatever moves, joins or shifts them."""
    found = _Region([], [], [])
    seen: set[fx.Node] = set()
    todo = [(scores, 1.0)]
    while todo:
        node, factor = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        contraction = read_contraction(node) if kind(node) in (*CONTRACTIONS, "sum") else None
        if contraction is not None and _is_product(view, contraction):
            found.products.append((contraction, factor * contraction.factor))
        elif kind(node) in CARRYING and view.origins.is_data(node):
            found.nodes.append(node)
            found.sides.extend(_hiding(node))
            todo.extend((n, factor * own_factor(node)) for n in carried(node))
        elif kind(node) not in CONSTANT:
            found.sides.append(node)
    return found


def carried(node: fx.Node) -> list[fx.Node]:
    """List the inputs whose values a node that moves or shifts values passes on."""
    name = kind(node)
    if name in WRITES:
        given = [args(node)[i] for i in WRITES[name]]
    elif name in JOINING:
        given = list(args(node)[0])
    elif name in LAYOUT | TRANSPARENT | {"masked_fill"}:
        given = [args(node)[0]]
    elif name == "where":
        given = list(args(node)[1:])
    else:
        given = tensor_inputs(node)
    return [n for n in given if isinstance(n, fx.Node) and is_tensor(n)]


def _hiding(node: fx.Node) -> list[fx.Node]:
    """List the condition on which a node writes another value."""
    at = {"where": 0, "masked_fill": 1}.get(kind(node))
    return [args(node)[at]] if at is not None else []


def own_factor(node: fx.Node) -> float:
    """Return the number that a node multiplies what passes by."""
    if kind(node) not in ("mul", "div") or len(args(node)) < 2:
        return 1.0
    number: Any = args(node)[1]
    if not is_number(number) or number == 0:
        return 1.0
    return float(number) if kind(node) == "mul" else 1.0 / float(number)


def _is_product(view: View, c: Contraction) -> bool:
    return bool(c.summed) and all(view.origins.is_data(x) for x in (c.lhs, c.rhs))


def _values(view: View, anchor: Anchor) -> tuple[tuple[Contraction, fx.Node], ...]:
    """Walk forth from the weights, inside their module, to the products with activations."""
    found: dict[fx.Node, tuple[Contraction, fx.Node]] = {}
    home = module_path(anchor.weights)
    seen = {anchor.weights}
    todo = [anchor.weights]
    while todo:
        node = todo.pop(0)
        for user in sorted(node.users):
            if user in seen or module_path(user) != home:
                continue
            contraction = read_contraction(user) if kind(user) in (*CONTRACTIONS, "sum") else None
            if contraction is not None and node in (contraction.lhs, contraction.rhs):
                other = contraction.rhs if node is contraction.lhs else contraction.lhs
                if contraction.summed and view.origins.is_data(other):
                    found.setdefault(user, (contraction, other))
            elif kind(user) in CARRYING and node in carried(user):
                seen.add(user)
                todo.append(user)
    return tuple(found.values())
