"""The scale of queries and keys: constant factors between their projections and their product."""

from typing import Any

from torch import Tensor, fx

from attnopt.finder.match import Operand
from attnopt.finder.ops import JOINING, LAYOUT, TRANSPARENT, args, is_number, kind, value
from attnopt.finder.provenance import View
from attnopt.finder.walking import is_projection

_LINEAR = frozenset(
    "add sub mul div true_divide neg masked_fill lerp view_as_complex view_as_real".split()
)
# Ops past which a constant factor of their main operand is still one.
_SCALABLE = (TRANSPARENT | LAYOUT | JOINING | _LINEAR) - {"constant_pad_nd", "pad"}


def scale_before(view: View, operand: Operand) -> float:
    """Multiply the constants that an operand is scaled by between projection and product.

    The newest element is followed, so that of joined parts the one that it comes from counts.
    """
    factor = 1.0
    node: fx.Node = operand.product
    place = int(view.provenance.numbers(node).argmax())
    while not is_projection(view, node) and _keeps_scale(node):
        factor *= _factor_in(view, node)
        step = view.provenance.step_back(node, place)
        if step is None and kind(node) in LAYOUT:
            # Data choose the elements, all of them scaled alike.
            source = args(node)[0]
            step = source, int(view.provenance.numbers(source).argmax())
        if step is None:
            break
        node, place = step
    return factor


def _factor_in(view: View, node: fx.Node) -> float:
    """Return the constant that a node multiplies by; 1 where it does something else."""
    name = kind(node)
    if name not in ("mul", "div", "true_divide") or len(args(node)) < 2:
        return 1.0
    top, bottom = args(node)[:2]
    number = _constant(view, bottom)
    if number is not None:
        return number if name == "mul" else 1.0 / number
    number = _constant(view, top) if name == "mul" else None
    return 1.0 if number is None else number


def _keeps_scale(node: fx.Node) -> bool:
    """Tell whether a factor before a node is one after it: not so in x / norm(x)."""
    return kind(node) in _SCALABLE and not any(
        kind(n) in ("rsqrt", "linalg_vector_norm", "norm", "clamp_min")
        for n in node.all_input_nodes
    )


def _constant(view: View, x: Any) -> float | None:
    if is_number(x):
        return float(x)
    if not isinstance(x, fx.Node) or not isinstance(value(x), Tensor) or value(x).numel() != 1:
        return None
    found: float | None = view.scalars.scalar(x)
    return found
