"""Element numbers through writes, means and indices that data decide.

An unknown index is taken to point at the first place, and a mean to be the first of its elements:
which token an element comes from is lost there, which head and channel is not.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import Contraction
from attnopt.finder.evaluate import Sizes, at_sizes, evaluate, is_size
from attnopt.finder.ops import LAYOUT, WRITES, args, argument, is_tensor, kind, tensor_inputs, value
from attnopt.finder.provenance import CONSTANT, Provenance, Root, View, run_layout

# Above the numbers that a caller gives to nodes.
_FIRST = 1 << 30
_LAST = torch.iinfo(torch.int32).max


class Blurred(Provenance):
    """Numbers that survive what plain provenance stops at; `given` numbers some nodes."""

    def __init__(
        self, view: View, given: dict[fx.Node, Tensor] | None = None, sizes: Sizes | None = None
    ) -> None:
        super().__init__(view.program, view.shapes, view.origins, sizes or view.shapes.captured)
        self._next = _FIRST if given else 0
        self._dtype = next(iter(given.values())).dtype if given else torch.int64
        self._numbers = {(n, False): x for n, x in (given or {}).items()}
        self.lost: set[fx.Node] = set()

    def numbers_alone(self, node: fx.Node) -> Tensor:
        """Return the numbers of a node, and forget those of each step on the way after its use."""
        read: dict[fx.Node, set[fx.Node]] = {}
        todo = [node]
        while todo:
            step = todo.pop()
            if step not in read:
                known = (step, False) in self._numbers
                read[step] = set() if known else set(self.sources(step))
                todo.extend(read[step])
        waiting = Counter(source for sources in read.values() for source in sources)
        for step in sorted(read):
            self._trace(step, second=False)
            for source in read[step]:
                waiting[source] -= 1
                if not waiting[source]:
                    del self._numbers[(source, False)]
        return self.numbers(node)

    def _number(self, node: fx.Node, example: Tensor) -> Tensor:
        numbers = super()._number(node, example)
        return numbers if self._next > _LAST else numbers.to(self._dtype)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """List the inputs whose numbers a node passes on; none at a root."""
        return self._sources(node, second=False)

    def _movable(self, node: fx.Node) -> bool:
        if super()._movable(node):
            return True
        return kind(node) != "getitem" and is_tensor(args(node)[0])

    def _sources(self, node: fx.Node, second: bool) -> list[fx.Node]:
        name = kind(node)
        if name in WRITES:
            found = [args(node)[i] for i in WRITES[name]]
            return [n for n in found if isinstance(n, fx.Node) and is_tensor(n)]
        if name == "mean" and argument(node, 1, "dim") is not None:
            return [args(node)[0]]
        if name == "where" and self._known(args(node)[0]) is not None:
            return [n for n in args(node)[1:] if isinstance(n, fx.Node)]
        return super()._sources(node, second)

    def carrier(self, node: fx.Node, *, second: bool = False) -> fx.Node | None:
        """Choose the operand that an elementwise op acts on; never one that is filled in."""
        if kind(node) == "where":
            kept = [n for n in args(node)[1:] if isinstance(n, fx.Node) and is_tensor(n)]
            kept = [n for n in kept if kind(n) not in CONSTANT and self.origins.is_data(n)]
            if len(kept) == 1:
                return kept[0]
        return super().carrier(node, second=second)

    def _step(self, node: fx.Node, second: bool) -> Tensor | tuple[Tensor, ...]:
        name = kind(node)
        sources = self._sources(node, second)
        if name in WRITES:
            return self._move(node, {n: self._numbers[(n, second)] for n in sources})
        if name == "mean":
            return self._mean(node, second)
        if name in ("where", "masked_fill") and sources:
            return self._chosen(node, second)
        return super()._step(node, second)

    def _mean(self, node: fx.Node, second: bool) -> Tensor:
        numbers = self._numbers[(args(node)[0], second)]
        assert isinstance(numbers, Tensor)
        self.lost.add(node)
        axes = argument(node, 1, "dim")
        for axis in sorted((a % numbers.dim() for a in axes), reverse=True):
            numbers = numbers.narrow(axis, 0, 1)
            if not argument(node, 2, "keepdim", default=False):
                numbers = numbers.squeeze(axis)
        return numbers

    def _chosen(self, node: fx.Node, second: bool) -> Tensor:
        """Leave out what a mask of positions hides."""
        shape = self.shapes.shape(node, self.sizes)
        name = kind(node)
        condition = self._known(args(node)[0 if name == "where" else 1])
        if condition is None:
            (carrier,) = self._sources(node, second)
            return self._held(carrier, second).expand(shape)
        if name == "masked_fill":
            kept = self._held(args(node)[0], second)
            return torch.where(condition.bool(), -1, kept).expand(shape)
        a, b = (self._held(x, second) for x in args(node)[1:])
        return torch.where(condition.bool(), a, b).expand(shape)

    def _held(self, x: Any, second: bool) -> Tensor:
        found = self._numbers[(x, second)] if isinstance(x, fx.Node) else torch.tensor(-1)
        assert isinstance(found, Tensor)
        return found

    def _known(self, node: Any) -> Tensor | None:
        """Evaluate what positions and constants decide; what is filled in needs only a shape."""
        if not isinstance(node, fx.Node):
            return None
        ends: set[fx.Node] = set()
        todo, seen = [node], set[fx.Node]()
        while todo:
            n = todo.pop()
            if n in seen or is_size(n):
                continue
            seen.add(n)
            if n.op == "placeholder":
                if self.program.bindings[n.name].kind not in ("buffer", "constant"):
                    return None
            elif kind(n) in CONSTANT:
                ends.update(tensor_inputs(n))
            else:
                todo.extend(n.all_input_nodes)

        def leaf(n: fx.Node) -> Tensor:
            if n not in ends:
                return self._constant(n)
            return torch.zeros(self.shapes.shape(n, self.sizes), dtype=value(n).dtype)

        (found,) = evaluate([node], leaf, sizes=self.sizes, stop=ends)
        return found if isinstance(found, Tensor) else None

    def _move(
        self, node: fx.Node, found: dict[fx.Node, Tensor | tuple[Tensor, ...]]
    ) -> Tensor | tuple[Tensor, ...]:
        if kind(node) in LAYOUT and super()._movable(node):
            return super()._move(node, found)
        self.lost.add(node) if kind(node) in LAYOUT else None

        def read(n: fx.Node) -> Any:
            if n in found:
                return found[n]
            if is_size(n):
                return at_sizes(value(n), self.sizes)
            known = self._known(n)
            if known is not None:
                return known
            self.lost.add(node)
            return torch.zeros(self.shapes.shape(n, self.sizes), dtype=value(n).dtype)

        given: Any = list(fx.map_arg(node.args, read))
        named: Any = fx.map_arg(node.kwargs, read)
        for i in WRITES.get(kind(node), ()):
            if not isinstance(given[i], Tensor):
                given[i] = torch.tensor(-1)
        moved: Tensor = run_layout(node, given, named)
        return moved


def aligned(numbers: Tensor, labels: tuple[str, ...], c: Contraction, shape: Any) -> Tensor:
    """Broadcast numbers with labelled axes to a contraction's result."""
    kept = [x for x in c.out_labels if x in labels]
    moved = numbers.permute([labels.index(x) for x in kept])
    at = [slice(None) if x in kept else None for x in c.out_labels]
    return moved[tuple(at)].expand(shape)


def inside(root: Root, numbers: Tensor) -> Tensor:
    """Tell which numbers belong to a root."""
    count = 1
    for size in root.shape:
        count *= size
    return (numbers >= root.base) & (numbers < root.base + count)
