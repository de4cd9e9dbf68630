"""Sizes to try masks at: those of the capture, small ones, and ones around their constants."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from attnopt.finder.evaluate import Sizes, is_size
from attnopt.finder.mask_values import MaskValues
from attnopt.finder.ops import args, is_number, kind, value
from attnopt.nouns import Mask

_FILLING = frozenset("masked_fill where full full_like new_full mul scalar_tensor slice".split())
_PADDING_TRIALS = 8
_LONG_TRIALS = 3
_LARGEST_SQUARE = 8200
_LARGEST_PADDED_SQUARE = 2100
_LARGEST_INTEGER = 65536
_LARGEST_POSITION = 1e9


@dataclass(frozen=True)
class Trials:
    """Chooses sizes at which the masks of one site show what they are."""

    values: MaskValues

    def structural(self) -> Iterator[Sizes]:
        """Yield sizes: those of the capture, small ones, and ones around every constant.

        With a state, a few rows after a long past show what a square mask would.
        """
        yield dict(self.values.view.shapes.captured)
        found = self._length_symbols()
        if not found:
            return
        queries, past = found
        for n in sorted({3, 7, 13, *self._constants()}):
            if past is not None:
                rows = min(3, n)
                yield self._sized(queries[0], rows, past, n - rows)
                if n <= 64:
                    yield self._sized(queries[0], n, past, 0)
            elif n <= _LARGEST_SQUARE:
                yield self._sized(queries[0], n, None, 0)

    def _sized(
        self, query: sympy.Symbol, length: int, past: sympy.Symbol | None, before: int
    ) -> Sizes:
        """Set a number of queries after a past; sizes that were equal at capture stay equal.

        Each input has symbols of its own, so a mask as long as the keys must follow them.
        """
        captured = self.values.view.shapes.captured
        old, old_past = captured[query], captured[past] if past is not None else 0
        follow = {old: length, old + old_past: length + before}
        if past is not None:
            follow[old_past] = before
        sources = self.values.view.shapes.sources
        return {
            s: size if s not in sources or sources[s][1] == 0 else follow.get(size, size)
            for s, size in captured.items()
        }

    def _length_symbols(self) -> tuple[list[sympy.Symbol], sympy.Symbol | None] | None:
        """Find the symbols that lengths of queries and keys are made of."""
        past = self.values.past
        used: set[sympy.Symbol] = set()
        for role, operand in (("T", self.values.match.q), ("S", self.values.match.k)):
            pairs = zip(
                value(operand.product).shape, self.values.layout_of(operand).axes, strict=True
            )
            for size, axis in pairs:
                if any(f.role == role for f in axis) and isinstance(size, torch.SymInt):
                    used |= size.node.expr.free_symbols
        sources = self.values.view.shapes.sources
        # Every state has a past of its own, and keys are as long as that and the queries together.
        queries = [s for s in sources if s in used and not self.values.is_past(s)]
        return (queries, past) if queries else None

    def _constants(self) -> set[int]:
        """Collect the integers in the mask's own subgraph, and their neighbours."""
        named = self.values.match.structure
        found = _integers([n for n in (named.window, named.right, named.prefix) if n is not None])
        for node in {n for term in self.values.hard for n in term.nodes()}:
            if node.op == "placeholder" and not is_size(node):
                binding = self.values.program.bindings[node.name]
                if binding.kind in ("buffer", "constant"):
                    found |= _stored_integers(self.values.program.weights[binding.name])
            elif node.op == "call_function" and kind(node) not in (
                "slice",
                "view",
                "reshape",
                "expand",
            ):
                for arg in (*args(node), *node.kwargs.values()):
                    found |= _integers(arg)
        return {n for c in found for n in (c - 1, c, c + 1, 2 * c + 1) if n > 1}

    def covers_its_constants(self) -> bool:
        """Tell whether every number that may bound a structure was passed by some trial."""
        found = self._length_symbols()
        if not found:
            return True
        most = _LARGEST_INTEGER if found[1] is not None else _LARGEST_SQUARE // 2
        nodes = [n for t in self.values.hard for n in t.nodes() if kind(n) not in _FILLING]
        given: list[Any] = [a for n in nodes for a in (*args(n), *n.kwargs.values())]
        return not any(is_number(a) and most < abs(a) < _LARGEST_POSITION for a in given)

    def with_padding(self, structure: Mask) -> Iterator[tuple[Sizes, int]]:
        """Yield sizes and seeds to try mask inputs with.

        Where a structure is longer than what was captured, there are longer ones, too.
        """
        for seed in range(_PADDING_TRIALS):
            yield self.values.view.shapes.captured, seed
        longer = self._beyond(structure)
        if longer is not None:
            for seed in range(_LONG_TRIALS):
                yield longer, seed

    def _beyond(self, structure: Mask) -> Sizes | None:
        """Return sizes at which a structure shows that the capture is too short for."""
        named = (structure.window, structure.right, structure.prefix, structure.first)
        length = 2 * max((n for n in named if n is not None), default=0) + 1
        found = self._length_symbols()
        if found is None or length <= self.values.length("S", self.values.view.shapes.captured):
            return None
        queries, past = found
        if past is not None:
            rows = min(3, length)
            return self._sized(queries[0], rows, past, length - rows)
        return (
            self._sized(queries[0], length, None, 0) if length <= _LARGEST_PADDED_SQUARE else None
        )


def _stored_integers(stored: Tensor) -> set[int]:
    """Return a stored number, or the length of the window that a stored square mask shows."""
    if stored.numel() == 1:
        return _integers(stored.item())
    if stored.dim() < 2 or stored.shape[-1] != stored.shape[-2] or stored.is_complex():
        return set()
    last = stored.reshape(-1, stored.shape[-1])[-1]
    return {int((last == last[-1]).sum())}


def _integers(x: Any) -> set[int]:
    if isinstance(x, list | tuple):
        return {n for y in x for n in _integers(y)}
    if is_number(x) and 2 <= abs(x) <= _LARGEST_INTEGER and float(x).is_integer():
        return {abs(int(x))}
    return set()
