"""Anchors of attention: wherever scores are normalised, by softmax in any form.

Softmax may be written out (exponentials over their sum, with zeros written in, with a sink), and
the division may come after the product with the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.finder.ops import (
    LOG_SOFTMAX,
    SDPA,
    SOFTMAX,
    TRANSPARENT,
    args,
    argument,
    is_number,
    kind,
    rank,
)
from attnopt.ops import attention
from attnopt.ops.variants import fast_copy


@dataclass(frozen=True)
class Step:
    """One step of score arithmetic on the main operand.

    scale: times `number`. multiply: times `side`. add: plus `number` * `side`. hide: where `side`
    is `when`, `number` is written. tanh. layout: an index map. sink: `side` joins as a column.
    drop: the sink column leaves. keep: nothing (clamps at a mask's value, shifts along the keys).
    """

    op: str
    node: fx.Node
    side: fx.Node | None = None
    number: float = 1.0
    when: bool = True


@dataclass(frozen=True)
class Anchor:
    """Where scores become weights: `scores` normalised over `axis` give `weights`.

    `result` is set where the division by the sum comes after the product with the values.
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    result: fx.Node | None = None
    pieces: frozenset[fx.Node] = frozenset()
    sink: Step | None = None


def find_anchors(graph: fx.Graph) -> Iterator[Anchor]:
    """Yield every normalisation of scores, in order of execution."""
    for node in graph.nodes:
        name = kind(node)
        if name in SOFTMAX:
            scores = args(node)[0]
            yield Anchor(scores, node, args(node)[1] % rank(scores))
        elif name == "exp":
            anchor = _log_domain(node)
            if anchor:
                yield anchor
        elif name in ("div", "mul"):
            anchor = _by_division(node)
            if anchor:
                yield anchor


def is_fused(node: fx.Node) -> bool:
    """Tell whether a node is a fused attention op."""
    return kind(node) in SDPA


def is_canonical(node: fx.Node) -> bool:
    """Tell whether a node is the canonical attention op."""
    return node.target is attention


def is_variant(node: fx.Node) -> bool:
    """Tell whether a node is an op that an attention was rewritten to, the canonical one too."""
    return fast_copy(node) is not None


def through(node: Any) -> Any:
    """Step back over casts, clones and dropout."""
    while isinstance(node, fx.Node) and kind(node) in TRANSPARENT:
        node = args(node)[0]
    return node


def _log_domain(node: fx.Node) -> Anchor | None:
    """Read exp(log_softmax(x)) and exp(x - logsumexp(x))."""
    inner = through(args(node)[0])
    if kind(inner) in LOG_SOFTMAX:
        scores = args(inner)[0]
        return Anchor(scores, node, args(inner)[1] % rank(scores))
    if kind(inner) != "sub":
        return None
    scores, total = args(inner)[0], through(args(inner)[1])
    total = args(total)[0] if kind(total) == "unsqueeze" else total
    total = through(total)
    if kind(total) != "logsumexp" or through(args(total)[0]) is not through(scores):
        return None
    axes = argument(total, 1, "dim")
    axis = axes[0] if isinstance(axes, list | tuple) else axes
    return Anchor(scores, node, axis % rank(scores))


def _by_division(node: fx.Node) -> Anchor | None:
    """Read exp(x) / sum(exp(x)), and (exp(x) v) / sum(exp(x))."""
    top, bottom = (through(a) for a in args(node)[:2])
    if not isinstance(top, fx.Node) or not isinstance(bottom, fx.Node):
        return None
    if kind(node) == "mul":
        if kind(top) == "reciprocal":
            top, bottom = bottom, top
        if kind(bottom) != "reciprocal":
            return None
        bottom = through(args(bottom)[0])
    bottom, sink = _without_sink(bottom)
    total = _the_sum(bottom)
    if total is None:
        return None
    exponential = through(args(total)[0])
    if kind(exponential) not in ("exp", "masked_fill", "mul", "where"):
        return None
    source = _under_zeros(exponential)
    axes = argument(total, 1, "dim")
    if kind(source) != "exp" or axes is None:
        return None
    axis = (axes[0] if isinstance(axes, list | tuple) else axes) % rank(exponential)
    scores = args(source)[0]
    if top is exponential:
        return Anchor(scores, node, axis, sink=sink)
    return Anchor(scores, exponential, axis, result=node, pieces=_towards(total, node), sink=sink)


def _towards(total: fx.Node, division: fx.Node) -> frozenset[fx.Node]:
    """List the sum, and the casts of the exponentials that only it reads."""
    found = {total}
    node: Any = args(total)[0]
    while isinstance(node, fx.Node) and kind(node) in TRANSPARENT and len(node.users) == 1:
        found.add(node)
        node = args(node)[0]
    return frozenset(found)


def _without_sink(node: fx.Node) -> tuple[fx.Node, Step | None]:
    """Split sum(exp(x - top)) + exp(sink - top) into the sum and the sink."""
    if kind(node) != "add" or len(node.all_input_nodes) != 2:
        return node, None
    for total, other in (args(node)[:2], args(node)[1::-1]):
        exponential = through(other)
        if _the_sum(through(total)) is None or kind(exponential) != "exp":
            continue
        logit = through(args(exponential)[0])
        if kind(logit) == "sub" and isinstance(args(logit)[0], fx.Node):
            logit = args(logit)[0]
        return through(total), Step("sink", node, side=logit, when=True)
    return node, None


_OVER_SUMS = frozenset(
    "unsqueeze clamp clamp_min maximum add masked_fill reshape view transpose permute "
    "expand".split()
)


def _the_sum(start: fx.Node) -> fx.Node | None:
    """Find sum(x) under an epsilon, a clamp, a where or an unsqueeze."""
    node: Any = start
    for _ in range(4):
        node = through(node)
        if not isinstance(node, fx.Node):
            return None
        if kind(node) == "sum":
            return node
        if kind(node) in _OVER_SUMS:
            if kind(node) == "add" and not (is_number(args(node)[1]) and args(node)[1] < 1e-3):
                return None
            node = args(node)[0]
        elif kind(node) == "where":
            sides = [through(a) for a in args(node)[1:] if isinstance(a, fx.Node)]
            sums = [s for s in sides if kind(s) == "sum"]
            return sums[0] if sums else None
        else:
            return None
    return None


def _under_zeros(start: fx.Node) -> fx.Node:
    """Step back from exp(x) with zeros written in, to exp(x)."""
    node: Any = start
    while kind(node) in ("masked_fill", "where", *TRANSPARENT):
        inner = args(node)[0]
        if kind(node) == "where":
            inner = next((a for a in args(node)[1:] if kind(through(a)) == "exp"), args(node)[1])
        node = through(inner)
        if not isinstance(node, fx.Node):
            return start
    assert isinstance(node, fx.Node)
    return node
