"""Match an attention that is assembled from pieces, so that it can be rewritten as a whole.

A reading knows the query and the key of every score. From that follow queries, keys and values
before they are cut into pieces, the node where the results are whole again, which keys a query
sees, and what is added to all scores of a key. The match is a guess that the proof decides.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, fx

from attnopt.finder.anchors import Step
from attnopt.finder.assembled import Held, Reading
from attnopt.finder.blurred import Blurred, aligned, inside
from attnopt.finder.contraction import Contraction
from attnopt.finder.key_bias import KeyBias, find_key_bias
from attnopt.finder.layout import Factor, Layout, read_layout
from attnopt.finder.match import Match, Operand, Side
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, argument, is_number, is_tensor, kind
from attnopt.finder.pieces import CARRYING, carried
from attnopt.finder.provenance import Root, View
from attnopt.finder.structures import name_structure
from attnopt.nouns import No

# Scores of all queries and keys that a proof forms at once.
_LARGEST = 1 << 27
# Numbers that `Blurred` gives to nodes of its own start here.
_NUMBERS = 1 << 30


def match_region(view: View, reading: Reading) -> Match | No:
    """Match the whole of an attention that was read by structure, or say what is missing."""
    try:
        return _Region(view, reading).match()
    except _RefusalError as refused:
        return No(str(refused), reading.anchor.name)


class _RefusalError(Exception):
    """Carries a refusal out of nested reading code to `match_region`."""


class _Tokens:
    """Says of the elements of an operand's root which batch row, head, token and channel they are.

    `axes` are the axes of the root that its tokens are on.
    """

    def __init__(self, held: Held, axes: tuple[int, ...]) -> None:
        self.root = held.root
        rows = [i for i in range(len(held.root.shape)) if i not in held.root.channels]
        self.tokens = tuple(i for i in rows if i in axes)
        self.batch = tuple(i for i in rows if i not in axes)
        self.heads = len(held.heads)
        self.width = len(held.heads[0])
        table = torch.full((1 + max(max(h) for h in held.heads),), -1)
        for i, head in enumerate(held.heads):
            table[list(head)] = torch.arange(self.width) + i * self.width
        self._table = table

    def size(self, axes: tuple[int, ...]) -> int:
        """Count the places along some axes of the root."""
        return math.prod(self.root.shape[i] for i in axes)

    def places(self, numbers: Tensor, token: str, channel: str) -> dict[str, Tensor]:
        """Return the running numbers of batch row, head, token and channel."""
        numbers = numbers.long()
        head, within = self.held(self.root.place(numbers)[1])
        return {
            "B": self._along(numbers, self.batch),
            "H": head,
            token: self._along(numbers, self.tokens),
            channel: within,
        }

    def held(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head that channels of the root are of, and their places in it."""
        held = self._table[channels.long().clamp(0, len(self._table) - 1)]
        return held // self.width, held % self.width

    def _along(self, numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
        total = torch.zeros_like(numbers)
        for axis in axes:
            total = total * self.root.shape[axis] + self.root.index(numbers, axis)
        return total


class _Region:
    """Finds the operands, the mask and the result of one reading."""

    def __init__(self, view: View, reading: Reading) -> None:
        self.view = view
        self.reading = reading
        self.between = reading.between
        self.anchor = reading.between.anchor
        self.origin = reading.origin
        self.sizes = reading.origin.sizes

    def match(self) -> Match:
        """Read everything, raising `_RefusalError` where something does not fit."""
        self._check()
        self._number_scores()
        bias = self._bias()
        visible = self._visible()
        structure = name_structure([visible])
        if structure.kind == "dense":
            raise _RefusalError("no name fits the keys that queries see")
        after = self._after()
        result, layout, v_heads = self._result()
        q = self._operand(0, self.q, "TD")
        k = self._operand(1, self.k, "SD")
        v = self._operand(2, self._values(), "SE")
        heads = self.q.heads
        sizes = {"B": self.q.size(self.q.batch), "H": heads}
        sizes |= {"T": visible.shape[0], "S": visible.shape[1]}
        return Match(
            module=self.reading.module,
            anchor=self.reading.anchor,
            result=result,
            result_layout=layout,
            q=q,
            k=replace(k, heads=self._key_heads()),
            v=replace(v, heads=v_heads),
            scale=self._scale(),
            softcap=None,
            sides=() if bias is None else (_added(bias),),
            sinks=None,
            after=tuple(after),
            after_scale=1.0,
            structure=structure,
            reused=(),
            scores_layout=Layout(tuple(_axis(role, sizes[role]) for role in "BHTS")),
            contraction=self.between.products[0],
            assembled=True,
        )

    def _check(self) -> None:
        """Refuse what is not one softmax, or is too large to be numbered or proved."""
        if self.anchor.result is not None or self.anchor.sink is not None:
            raise _RefusalError("the softmax is written out")
        if self.sizes != self.view.shapes.captured:
            raise _RefusalError("its scores are too many to follow")
        pairs = self.reading.pairs
        roots = [{pair[i].root.node for pair in pairs} for i in (0, 1)]
        if not pairs or any(len(nodes) > 1 for nodes in roots):
            raise _RefusalError("its queries or keys come from several places")
        if any(root.end >= _NUMBERS for root in self.origin.roots):
            raise _RefusalError("its operands are too large to follow")

    def _scale(self) -> float:
        if self.between.factor is None:
            raise _RefusalError("its pieces are scaled by different numbers")
        return self.between.factor

    # --- which query and key every score is of

    def _number_scores(self) -> None:
        """Number the first channel of the query and of the key that each score is of."""
        axis = self.anchor.axis
        lines = [self._lines(which).movedim(axis, -1) for which in (0, 1)]
        roots = [self.reading.q.root, self.reading.k.root]
        self.seen = inside(roots[0], lines[0]) & inside(roots[1], lines[1])
        if not self.seen.any():
            raise _RefusalError("it is not known which tokens meet")
        self.lines = lines
        axes = self._token_axes(roots)
        self.q, self.k = _Tokens(self.reading.q, axes), _Tokens(self.reading.k, axes)
        if (
            self.q.size(self.q.batch)
            * self.q.heads
            * self.q.size(self.q.tokens)
            * self.k.size(self.k.tokens)
            > _LARGEST
        ):
            raise _RefusalError("its scores are too many to prove")
        self.q_at = self.q.places(lines[0], "T", "D")
        self.k_at = self.k.places(lines[1], "S", "D")

    def _lines(self, which: int) -> Tensor:
        given: dict[fx.Node, Tensor] = {}
        for c, pair in zip(self.between.products, self.reading.pairs, strict=True):
            held = pair[which]
            numbers = self.origin.numbers(held.node)
            for axis in reversed([i for i, x in enumerate(held.labels) if x in c.summed]):
                numbers = numbers.select(axis, 0)
            labels = tuple(x for x in held.labels if x not in c.summed)
            numbers = torch.where(inside(held.root, numbers), numbers, -1).to(torch.int32)
            shape = self.view.shapes.shape(c.node, self.sizes)
            given[c.node] = aligned(numbers, labels, c, shape)
        return Blurred(self.view, given, self.sizes).numbers_alone(self.anchor.scores)

    def _token_axes(self, roots: list[Root]) -> tuple[int, ...]:
        """List the axes along which queries see keys at other places than their own."""
        rows = [[i for i in range(len(r.shape)) if i not in r.channels] for r in roots]
        if rows[0] != rows[1]:
            raise _RefusalError("queries and keys have different axes")
        q, k = (line[self.seen].long() for line in self.lines)
        found = [
            axis
            for axis in rows[0]
            if roots[0].shape[axis] != roots[1].shape[axis]
            or (roots[0].index(q, axis) != roots[1].index(k, axis)).any()
        ]
        if not found:
            raise _RefusalError("its queries see no keys but their own")
        return tuple(found)

    def _visible(self) -> Tensor:
        """Return which keys (S) queries (T) see, in all heads and rows of the batch alike."""
        queries, keys = self.q.size(self.q.tokens), self.k.size(self.k.tokens)
        pairs = self.q_at["T"][self.seen] * keys + self.k_at["S"][self.seen]
        counts = torch.bincount(pairs, minlength=queries * keys).view(queries, keys)
        every = self.q.size(self.q.batch) * self.q.heads
        if ((counts != 0) & (counts != every)).any():
            raise _RefusalError("keys are seen twice, or not by all heads alike")
        return counts > 0

    def _key_heads(self) -> tuple[int, ...]:
        heads = torch.zeros(self.q.heads, dtype=torch.long)
        heads[self.q_at["H"][self.seen]] = self.k_at["H"][self.seen]
        return tuple(heads.tolist())

    def _bias(self) -> KeyBias | None:
        """Find what is added to all scores of a key, and hide what is minus infinity."""
        places = {"B": self.q_at["B"], "H": self.q_at["H"], "S": self.k_at["S"]}
        found = find_key_bias(self.view, self.between, self.seen, places)
        if isinstance(found, No):
            raise _RefusalError(found.why)
        self.seen = self.seen & ~found.hidden
        return found if found.node is not None else None

    # --- operands as they are before they are cut

    def _values(self) -> _Tokens:
        v = self.reading.v
        if len(v.root.shape) != len(self.k.root.shape):
            raise _RefusalError("keys and values have different axes")
        self.v = _Tokens(v, self.k.tokens)
        return self.v

    def _operand(self, which: int, tokens: _Tokens, roles: str) -> Operand:
        """Take an operand where all of its elements are in one tensor, each once."""
        if which < 2:
            nodes = [pair[which].node for pair in self.reading.pairs]
        else:
            nodes = [x for c, x in self.between.values if x is not self._weights(c)]
        chains = [_chain(node) for node in nodes]
        numbers = torch.cat([self.origin.numbers(n).flatten() for n in nodes])
        used = torch.unique(numbers[inside(tokens.root, numbers)])
        for node in reversed(chains[0]):
            if not all(node in chain for chain in chains):
                continue
            own = self.origin.numbers(node)
            if own.numel() == len(used) and torch.equal(own.flatten().sort().values, used):
                layout = read_layout(tokens.places(own, *roles))
                if layout is not None:
                    heads = tuple(range(tokens.heads))
                    return Operand(node, layout, heads, node, tokens.heads)
        raise _RefusalError("an operand is nowhere whole and alone")

    # --- from the weights to the result

    def _weights(self, c: Contraction) -> fx.Node:
        """Return the operand of a product with values that holds weights."""
        return c.lhs if c.lhs in self._flow else c.rhs

    def _after(self) -> list[Side]:
        """Follow the weights to the products with values, and read what changes them."""
        axis = self.anchor.axis
        rows = torch.where(self.seen, self.lines[0], -1).amax(-1, keepdim=True)
        rows = rows.expand(self.seen.shape).movedim(-1, axis)
        self._after_softmax = Blurred(self.view, {self.anchor.weights: rows}, self.sizes)
        along = torch.arange(rows.shape[axis], dtype=rows.dtype)
        along = along.view([-1 if i == axis else 1 for i in range(rows.dim())]).expand(rows.shape)
        self._along_keys = Blurred(self.view, {self.anchor.weights: along}, self.sizes)
        products = {c.node for c, _ in self.between.values}
        self._flow = _flow(self.anchor.weights, products)
        return [self._step(node) for node in sorted(self._flow) if _changes(node)]

    def _step(self, node: fx.Node) -> Side:
        """Read a step on the weights that treats all keys of a query alike."""
        operands = args(node)
        kept = [n for n in operands[:2] if isinstance(n, fx.Node)]
        if len(kept) != 2 or kept[0] not in self._flow or kept[1] in self._flow:
            raise _RefusalError(f"{node.name} changes the weights")
        if kind(node) == "mul":
            step = Step("multiply", node, side=kept[1])
        elif kind(node) == "masked_fill" and is_number(operands[2]) and operands[2] == 0:
            step = Step("zero", node, side=kept[1], when=True)
        else:
            raise _RefusalError(f"{node.name} changes the weights")
        numbers = self._after_softmax.numbers(node)
        places = self.q.places(numbers, "T", "D") | {"S": self._along_keys.numbers(node).long()}
        layout = read_layout({role: places[role] for role in "BHTS"})
        if layout is None or not inside(self.q.root, numbers).all():
            raise _RefusalError(f"it is not known which weights {node.name} changes")
        side = Side(step, layout)
        if "S" in side.own_layout().roles:
            raise _RefusalError(f"{node.name} does not treat all keys of a query alike")
        return side

    def _result(self) -> tuple[fx.Node, Layout, tuple[int, ...]]:
        """Find the first node that holds all results, and through which all of them go."""
        v = self._values()
        queries: dict[fx.Node, Tensor] = {}
        values: dict[fx.Node, Tensor] = {}
        for c, operand in self.between.values:
            weights = self._after_softmax.numbers(self._weights(c))
            weights = torch.where(inside(self.q.root, weights), weights, -1)
            queries[c.node] = self._summed(c, self._weights(c), weights)
            numbers = self.origin.numbers(operand)
            channel = v.root.place(numbers)[1]
            channel = torch.where(inside(v.root, numbers), channel, -1)
            values[c.node] = self._summed(c, operand, channel.to(weights.dtype))
        after = [Blurred(self.view, given, self.sizes) for given in (queries, values)]
        whole = self.q.size(self.q.batch) * self.q.size(self.q.tokens) * self.q.heads * v.width
        for node in sorted(_flow_onward(queries)):
            q_line, channel = (numbers.numbers(node) for numbers in after)
            if q_line.numel() != whole or not inside(self.q.root, q_line).all():
                continue
            head, within = v.held(channel)
            places = self.q.places(q_line, "T", "D") | {"E": within}
            layout = read_layout({role: places[role] for role in "BHTE"})
            if layout is not None and is_passed(self.anchor.weights, node):
                heads = torch.zeros(self.q.heads, dtype=torch.long)
                heads[places["H"]] = head
                return node, layout, tuple(heads.tolist())
        raise _RefusalError("its results are nowhere whole, or its weights are read elsewhere")

    def _summed(self, c: Contraction, operand: fx.Node, numbers: Tensor) -> Tensor:
        """Bring numbers of an operand to a product, the greatest along what is summed over."""
        labels = c.labels(operand)
        for x in c.summed:
            numbers = numbers.amax(labels.index(x), keepdim=True)
        kept = tuple(x for x in labels if x not in c.summed)
        numbers = numbers.squeeze([i for i, x in enumerate(labels) if x in c.summed])
        return aligned(numbers, kept, c, self.view.shapes.shape(c.node, self.sizes))


def _axis(role: str, size: int) -> tuple[Factor, ...]:
    return (Factor(role, size, 1),) if size > 1 else ()


def _added(bias: KeyBias) -> Side:
    assert bias.node is not None
    assert bias.layout is not None
    return Side(Step("add", bias.node, side=bias.node), bias.layout)


def _chain(start: fx.Node) -> list[fx.Node]:
    """List a node and what it is an index map of, the nearest first."""
    found = [start]
    node = start
    while kind(node) in LAYOUT | TRANSPARENT and isinstance(args(node)[0], fx.Node):
        node = args(node)[0]
        if is_tensor(node) and not isinstance(node.meta["val"], tuple | list):
            found.append(node)
    return found


def _flow(start: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
    """List what passes on the values of a node, up to some others."""
    found = {start}
    todo = [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            passes = kind(user) in CARRYING and node in carried(user)
            if user not in found | ends and passes:
                found.add(user)
                todo.append(user)
    return found


def _flow_onward(starts: dict[fx.Node, Tensor]) -> set[fx.Node]:
    return {node for start in starts for node in _flow(start, set())}


def _changes(node: fx.Node) -> bool:
    """Tell whether a step is more than an index map, a cast or a pad of zeros."""
    name = kind(node)
    if "pad" in name:
        filled = argument(node, 3, "value") if name == "pad" else argument(node, 2, "value")
        return filled not in (None, 0, 0.0)
    return name not in LAYOUT | TRANSPARENT and "softmax" not in name and name != "exp"


def is_passed(start: fx.Node, gate: fx.Node) -> bool:
    """Tell whether all that is made from a node's values is made from another's."""
    seen = {gate, start}
    todo = [start]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return False
            if user not in seen and is_tensor(user):
                seen.add(user)
                todo.append(user)
    return True
