"""What is added to all scores of a key, however it is brought to where the scores are assembled.

The scores are run with products of zeros on random numbers in place of a node that the bias is
made from: where each score repeats one of them, that node is the bias, and the scores say which
element belongs to which key.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import ancestors, evaluate, is_size
from attnopt.finder.layout import Layout, read_layout
from attnopt.finder.ops import kind, tensor_inputs, value
from attnopt.finder.pieces import Between
from attnopt.finder.provenance import CONSTANT, View
from attnopt.nouns import No

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class KeyBias:
    """A node that is added to scores, by key; none where nothing is. `hidden`: minus infinity."""

    hidden: Tensor
    node: fx.Node | None = None
    layout: Layout | None = None


def find_key_bias(
    view: View, between: Between, seen: Tensor, places: Mapping[str, Tensor]
) -> KeyBias | No:
    """Find the node that a bias is made from, given the places of all scores (keys last)."""
    return _Search(view, between, seen, places).find()


class _Search:
    """Runs the scores without their products."""

    def __init__(
        self, view: View, between: Between, seen: Tensor, places: Mapping[str, Tensor]
    ) -> None:
        self.view = view
        self.scores = between.anchor.scores
        self.axis = between.anchor.axis
        self.products = [c.node for c in between.products]
        self.seen = seen
        self.places = places
        self.sizes = view.shapes.captured
        # Read for their shape alone.
        self._shapes: set[fx.Node] = set()

    def find(self) -> KeyBias | No:
        """Try the nodes before the scores; the one farthest back is what others are copies of."""
        if self._is_fixed(()):
            alone = self._run(None)
            hidden = self.seen & (alone == -torch.inf)
            if (alone[self.seen & ~hidden] != 0).any():
                return No("what is added to its scores is no bias by key", self.scores.name)
            return KeyBias(hidden)
        order = ancestors([self.scores], self.products)
        after = _downstream(order, self.products)
        best: KeyBias | None = None
        for node in reversed(order):
            if node not in after and self._is_bias(node):
                found = self._read(node)
                if found is None and best is not None:
                    break
                best = found or best
        return best or No("what is added to its scores is no bias by key", self.scores.name)

    def _is_fixed(self, ends: tuple[fx.Node, ...]) -> bool:
        """Tell whether the scores depend on nothing but their products and some nodes."""
        self._shapes = set()
        todo = [self.scores]
        seen = {*self.products, *ends}
        while todo:
            node = todo.pop()
            if node in seen or is_size(node):
                continue
            seen.add(node)
            if kind(node) in CONSTANT:
                self._shapes.update(tensor_inputs(node))
            elif node.op != "placeholder":
                todo.extend(node.all_input_nodes)
            elif self.view.program.bindings[node.name].kind not in ("buffer", "constant"):
                return False
        self._shapes -= seen
        return True

    def _is_bias(self, node: fx.Node) -> bool:
        example = value(node)
        floating = isinstance(example, Tensor) and example.is_floating_point()
        return floating and not self.view.origins.is_data(node) and self._is_fixed((node,))

    def _run(self, node: fx.Node | None, given: Tensor | None = None) -> Tensor:
        """Return the scores, keys last, with products of zeros."""
        program = self.view.program
        empty = {*self.products, *self._shapes}
        known = {n: torch.zeros(self.view.shapes.shape(n, self.sizes)) for n in empty}
        if node is not None and given is not None:
            known[node] = given

        def leaf(n: fx.Node) -> Tensor:
            return known[n] if n in known else program.weights[program.bindings[n.name].name]

        (found,) = evaluate([self.scores], leaf, sizes=self.sizes, stop=list(known), double=True)
        assert isinstance(found, Tensor)
        return found.movedim(self.axis, -1)

    def _read(self, node: fx.Node) -> KeyBias | None:
        """Read a node as the bias: each score repeats one of its elements."""
        shape = self.view.shapes.shape(node, self.sizes)
        counted = torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=torch.float64)
        try:
            without = self._run(node, torch.zeros(shape, dtype=torch.float64))
            repeated = self._run(node, counted.view(shape))
        except RuntimeError:
            return None
        hidden = self.seen & (without == -torch.inf)
        seen = self.seen & ~hidden
        at = repeated[seen].round().long() - 1
        if (without[seen] != 0).any() or not seen.any() or at.min() < 0 or at.max() >= len(counted):
            return None
        drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        again = self._run(node, drawn)[seen]
        if ((again - drawn.flatten()[at]).abs() > _TOLERANCE).any():
            return None
        layout = self._layout(at, seen, shape)
        return None if layout is None else KeyBias(hidden, node, layout)

    def _layout(self, at: Tensor, seen: Tensor, shape: tuple[int, ...]) -> Layout | None:
        """Read which key, and which head and row of the batch, each element belongs to."""
        coordinates: dict[str, Tensor] = {}
        for role, places in self.places.items():
            held = torch.full((torch.Size(shape).numel(),), -1)
            held[at] = places[seen]
            if (held < 0).any():
                return None
            if torch.equal(held[at], places[seen]):
                coordinates[role] = held.view(shape)
        if "S" not in coordinates:
            return None
        numbers = torch.zeros(shape, dtype=torch.long)
        for places in coordinates.values():
            numbers = numbers * (1 + int(places.max())) + places
        once = len(torch.unique(numbers)) == numbers.numel()
        return read_layout(coordinates) if once else None


def _downstream(order: list[fx.Node], starts: list[fx.Node]) -> set[fx.Node]:
    """List what is made from some nodes, of nodes in order of execution."""
    found = set(starts)
    for node in order:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
