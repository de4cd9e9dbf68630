"""The walk forth: from the weights of an anchor to their product with the values."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.finder.anchors import Anchor, Step
from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, kind, shape
from attnopt.finder.provenance import View
from attnopt.nouns import No


@dataclass(frozen=True)
class Forth:
    """The way from weights to the product with the values, and who else reads the weights."""

    contraction: Contraction
    steps: tuple[Step, ...]
    weights: fx.Node
    others: tuple[fx.Node, ...]


def forth(view: View, anchor: Anchor) -> Forth | No:
    """Find the product with the values that the weights of an anchor go into."""
    others: list[fx.Node] = []
    todo: list[tuple[fx.Node, tuple[Step, ...]]] = [(anchor.weights, ())]
    found: Forth | No = No("the weights meet no values", anchor.weights.name)
    while todo:
        node, steps = todo.pop(0)
        for user in sorted(node.users):
            if user in anchor.pieces or kind(user) == "sym_size":
                continue
            contraction = _value_product(view, node, user)
            if contraction is not None and not found:
                found = Forth(contraction, steps, node, ())
            elif len(steps) < 12 and (step := _weight_step(node, user)) is not None:
                todo.append((user, (*steps, step) if step.op != "keep" else steps))
            else:
                others.append(user)
    if isinstance(found, No):
        return found
    return Forth(found.contraction, found.steps, found.weights, tuple(others))


def _value_product(view: View, weights: fx.Node, user: fx.Node) -> Contraction | None:
    """Read a user of the weights as their product with the values."""
    if kind(user) == "mul":
        sums = [u for u in user.users if kind(u) == "sum"]
        contraction = read_contraction(sums[0]) if len(sums) == 1 else None
    else:
        contraction = read_contraction(user)
    if contraction is None or weights not in (contraction.lhs, contraction.rhs):
        return None
    other = contraction.rhs if weights is contraction.lhs else contraction.lhs
    origins = view.origins
    carries = origins.is_data(other) or (
        origins.is_learned(weights) and origins.is_learned(other) and origins.is_projected(other)
    )
    return contraction if carries and other is not weights else None


def _weight_step(node: fx.Node, user: fx.Node) -> Step | None:
    """Read a user of the weights as one more step before the values; None where it is none."""
    name = kind(user)
    if name in TRANSPARENT and args(user)[0] is node:
        return Step("keep", user)
    if name in LAYOUT and args(user)[0] is node and name != "getitem":
        if name == "slice" and shape(node) == shape(user):
            return Step("keep", user)
        return Step("drop" if name in ("slice", "narrow") else "layout", user)
    if name == "masked_fill" and args(user)[0] is node and args(user)[2] in (0, 0.0):
        return Step("zero", user, side=args(user)[1])
    if name == "where" and node in args(user)[1:]:
        return Step("zero", user, side=args(user)[0], when=args(user)[1] is not node)
    if name in ("mul", "div"):
        other: Any = args(user)[1] if args(user)[0] is node else args(user)[0]
        if isinstance(other, fx.Node) and other is not node and name == "mul":
            return Step("multiply", user, side=other)
        if isinstance(other, int | float):
            return Step("scale", user, number=float(other) if name == "mul" else 1 / float(other))
    return None
