"""The walk back: from the scores of an anchor to q.k, reading score arithmetic as steps."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.anchors import Step, through
from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.evaluate import evaluate, leaves
from attnopt.finder.ops import (
    CONTRACTIONS,
    LAYOUT,
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

# What a mask writes is at most this (or minus infinity); above it, it is a bias.
HARD = -1e4


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
