"""Anchors of attention, and the walks from them: back to q.k, forth to the values.

An anchor is wherever scores are normalised: softmax in any form, or a fused attention op. The walk
back reads score arithmetic as a list of steps; the walk forth does the same for the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.evaluate import evaluate, leaves
from attnopt.finder.ops import (
    CONTRACTIONS,
    LAYOUT,
    LOG_SOFTMAX,
    SDPA,
    SOFTMAX,
    TRANSPARENT,
    args,
    argument,
    is_number,
    is_tensor,
    kind,
    rank,
    shape,
    value,
)
from attnopt.finder.provenance import View
from attnopt.nouns import No
from attnopt.ops import attention
from attnopt.ops.variants import fast_copy

# What a mask writes is at most this (or minus infinity); above it, it is a bias.
HARD = -1e4


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


@dataclass(frozen=True)
class Trail:
    """The way from a query-key product to scores: steps in order of execution, and how direct."""

    contraction: Contraction
    steps: tuple[Step, ...]
    cost: int

    def then(self, step: Step, cost: int = 0) -> "Trail":
        """Add one more step."""
        return Trail(self.contraction, (*self.steps, step), self.cost + cost)


@dataclass
class Walker:
    """Walks back from scores, remembering what it found at every node."""

    view: View
    _trails: dict[fx.Node, Trail | No] = field(default_factory=dict)

    def back(self, node: Any, depth: int = 0) -> Trail | No:
        """Find the query-key product that a node's values come from by score arithmetic."""
        if not isinstance(node, fx.Node):
            return No("a number, not scores")
        if node not in self._trails:
            self._trails[node] = No("a loop in the graph", node.name)
            self._trails[node] = (
                self._read(node, depth) if depth < 80 else No("too long", node.name)
            )
        return self._trails[node]

    def _read(self, node: fx.Node, depth: int) -> Trail | No:
        name = kind(node)
        if name in CONTRACTIONS or name == "sum":
            return self._contraction(node)
        if name in TRANSPARENT:
            return self.back(args(node)[0], depth + 1)
        if name in LAYOUT:
            return self._layout(node, depth)
        reader = getattr(self, f"_{name}", None)
        if reader is not None:
            return reader(node, depth)  # type: ignore[no-any-return]
        return No(f"{name or node.op} is not score arithmetic", node.name)

    def _contraction(self, node: fx.Node) -> Trail | No:
        contraction = read_contraction(node)
        if contraction is None:
            return No(f"{kind(node)} is not a product of two tensors", node.name)
        refusal = self._not_query_key(contraction)
        if refusal is not None:
            return refusal
        trail = Trail(contraction, (), 0)
        if contraction.factor != 1.0:
            trail = trail.then(Step("scale", node, number=contraction.factor))
        if contraction.addend is not None:
            side = Step("add", node, side=contraction.addend, number=contraction.addend_factor)
            trail = trail.then(side)
        return trail

    def _not_query_key(self, c: Contraction) -> No | None:
        """Say why a contraction cannot be the product of queries and keys."""
        origins = self.view.origins
        learned = [x for x in (c.lhs, c.rhs) if origins.is_learned(x)]
        data = [x for x in (c.lhs, c.rhs) if origins.is_data(x)]
        if len(learned) == 2 and all(origins.is_projected(x) for x in learned):
            return None
        if len(learned) == 2 or not data:
            return No("the scores do not depend on the input", c.node.name)
        if len(c.summed) == 0:
            return No("an outer product, not scores", c.node.name)
        if len(data) == 2:
            return None
        if not learned:
            return No("the scores multiply data with positions, not queries with keys", c.node.name)
        if kind(c.node) in ("linear", "addmm", "conv1d", "conv2d", "mv") or not self._is_query(
            learned[0], c
        ):
            return No("the scores come from a learned table, no q.k product", c.node.name)
        return None

    def _is_query(self, node: fx.Node, c: Contraction) -> bool:
        """Tell learned queries (projected, or several heads of them) from a weight matrix."""
        bare = node
        while kind(bare) in TRANSPARENT | LAYOUT or kind(bare) in ("mul", "div"):
            bare = args(bare)[0]
        if bare.op != "placeholder":
            return True
        return rank(node) >= 3 and node is c.lhs

    def _layout(self, node: fx.Node, depth: int) -> Trail | No:
        main = args(node)[0]
        if kind(node) == "getitem":
            return No("one of several outputs is not score arithmetic", node.name)
        trail = self.back(main, depth + 1)
        if isinstance(trail, No):
            return trail
        assert isinstance(main, fx.Node)
        if kind(node) == "slice" and shape(main) == shape(node):
            return trail
        same = sorted(shape(node)) == sorted(shape(main))
        cost = 0 if same else 1 if _numel(node) == _numel(main) else 8
        if kind(node) in ("slice", "narrow") and any(s.op == "sink" for s in trail.steps):
            return trail.then(Step("drop", node))
        return trail.then(Step("layout", node), cost)

    def _best(self, candidates: list[tuple[Any, Step]], depth: int) -> Trail | No:
        """Follow the most direct of several operands; the others are its side operands."""
        best: Trail | No = No("no operand comes from a query-key product")
        for operand, step in candidates:
            trail = self.back(operand, depth + 1)
            if isinstance(trail, Trail) and (not isinstance(best, Trail) or trail.cost < best.cost):
                best = trail.then(step)
            elif isinstance(trail, No) and isinstance(best, No) and best.where == "":
                best = trail
        return best

    def _add(self, node: fx.Node, depth: int) -> Trail | No:
        return self._sum_of(node, depth, sign=1.0)

    def _sub(self, node: fx.Node, depth: int) -> Trail | No:
        return self._sum_of(node, depth, sign=-1.0)

    def _sum_of(self, node: fx.Node, depth: int, sign: float) -> Trail | No:
        a, b = args(node)[:2]
        alpha = float(argument(node, 2, "alpha", 1)) * sign
        if self.scalar(b) is not None:
            return self.then(a, Step("keep", node), depth)
        if sign < 0 and _is_shift(a, b):
            return self.then(a, Step("keep", node), depth)
        assert isinstance(b, fx.Node)
        candidates = [(a, Step("add", node, side=b, number=alpha))]
        if alpha == 1.0 and isinstance(a, fx.Node):
            candidates.append((b, Step("add", node, side=a)))
        return self._best(candidates, depth)

    def then(self, main: Any, step: Step, depth: int) -> Trail | No:
        """Walk back through the main operand and add a step."""
        trail = self.back(main, depth + 1)
        return trail.then(step) if isinstance(trail, Trail) else trail

    def _mul(self, node: fx.Node, depth: int) -> Trail | No:
        a, b = args(node)[:2]
        for main, other in ((a, b), (b, a)):
            number = self.scalar(other)
            if number is not None:
                return self.then(main, Step("scale", node, number=number), depth)
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        pairs = [(a, Step("multiply", node, side=b)), (b, Step("multiply", node, side=a))]
        return self._best(pairs, depth)

    def _div(self, node: fx.Node, depth: int) -> Trail | No:
        number = self.scalar(args(node)[1])
        if number is not None:
            if node.kwargs.get("rounding_mode") is not None or number == 0:
                return No("a rounding division is not score arithmetic", node.name)
            return self.then(args(node)[0], Step("scale", node, number=1.0 / number), depth)
        step = Step("multiply", node, side=args(node)[1], when=False)
        return self.then(args(node)[0], step, depth)

    _true_divide = _div

    def _neg(self, node: fx.Node, depth: int) -> Trail | No:
        return self.then(args(node)[0], Step("scale", node, number=-1.0), depth)

    def _tanh(self, node: fx.Node, depth: int) -> Trail | No:
        return self.then(args(node)[0], Step("tanh", node), depth)

    def _where(self, node: fx.Node, depth: int) -> Trail | No:
        condition, a, b = args(node)[:3]
        best: Trail | No = No("no branch of where() comes from a query-key product", node.name)
        for main, fill, when in ((a, b, False), (b, a, True)):
            trail = self.back(main, depth + 1)
            number = self.scalar(fill, uniform=True)
            if isinstance(trail, Trail) and number is not None:
                step = Step("hide", node, side=condition, number=number, when=when)
                return trail.then(step)
        return best

    def _masked_fill(self, node: fx.Node, depth: int) -> Trail | No:
        number = self.scalar(args(node)[2], uniform=True)
        if number is None:
            return No("masked_fill writes a value that is not constant", node.name)
        step = Step("hide", node, side=args(node)[1], number=number)
        return self.then(args(node)[0], step, depth)

    def _maximum(self, node: fx.Node, depth: int) -> Trail | No:
        bound = self.scalar(argument(node, 1, "min"), uniform=True)
        if bound is None or bound > HARD:
            return No("a clamp of the scores above the value of a mask", node.name)
        return self.then(args(node)[0], Step("keep", node), depth)

    _max = _clamp = _clamp_min = _maximum

    def _cat(self, node: fx.Node, depth: int) -> Trail | No:
        parts = args(node)[0]
        axis = argument(node, 1, "dim", 0) % rank(node)
        assert isinstance(parts, list | tuple)
        for i, part in enumerate(parts):
            trail = self.back(part, depth + 1)
            if not isinstance(trail, Trail):
                continue
            rest = [p for j, p in enumerate(parts) if j != i]
            if len(rest) == 1 and isinstance(rest[0], fx.Node) and shape(rest[0])[axis] == 1:
                return trail.then(Step("sink", node, side=rest[0], when=i == 0), cost=4)
            return No("scores are concatenated with other scores", node.name)
        return No("no part of the concatenation comes from a query-key product", node.name)

    def scalar(self, x: Any, *, uniform: bool = False) -> float | None:
        """Evaluate a number, or a constant tensor of one element (or, `uniform`, of equal ones)."""
        if is_number(x):
            return float(x)
        if not isinstance(x, fx.Node) or not is_tensor(x) or not isinstance(value(x), Tensor):
            return None
        if _numel(x) != 1 and not uniform:
            return None
        program = self.view.program
        found = leaves([x])
        if uniform and kind(through(x)) in ("full_like", "zeros_like", "ones_like", "new_full"):
            return _fill_value(through(x))
        if any(program.bindings[n.name].kind not in ("buffer", "constant") for n in found):
            return None
        try:
            (tensor,) = evaluate(
                [x],
                lambda n: program.weights[program.bindings[n.name].name],
                sizes=self.view.shapes.captured,
                double=True,
            )
        except (RuntimeError, KeyError, ValueError):
            return None
        if tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
            return None
        low, high = tensor.min().item(), tensor.max().item()
        return float(low) if low == high else None


def _fill_value(node: fx.Node) -> float | None:
    name = kind(node)
    if name in ("zeros_like", "ones_like"):
        return float(name == "ones_like")
    filled = args(node)[2] if name == "new_full" else args(node)[1]
    return float(filled) if is_number(filled) else None


def _numel(node: fx.Node) -> int:
    count = 1
    for size in shape(node):
        count *= size
    return count


def _is_shift(scores: Any, other: Any) -> bool:
    """Tell whether `other` is a maximum of the scores, which softmax does not notice."""
    wrappers = {"getitem", "unsqueeze", "where", "masked_fill", "clamp", *TRANSPARENT}
    todo = [other]
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node):
            continue
        if kind(node) in ("amax", "max") and through(args(node)[0]) is through(scores):
            return True
        if kind(node) in ("maximum", "max"):
            todo.extend(node.all_input_nodes)
        if kind(node) in wrappers:
            todo.extend(node.all_input_nodes)
    return False


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
