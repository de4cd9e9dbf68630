"""What masks show and hide at given sizes, as they compute it."""

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import Sizes, evaluate
from attnopt.finder.layout import Layout
from attnopt.finder.mask_terms import Term
from attnopt.finder.match import Match, Operand
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import value
from attnopt.finder.provenance import View
from attnopt.finder.structures import structure as shown_by


class MaskValues:
    """Evaluates the terms that hide keys from the queries of one site."""

    def __init__(self, view: View, match: Match, hard: list[Term], inputs: list[fx.Node]) -> None:
        self.view = view
        self.match = match
        self.program = view.program
        self.hard = hard
        self.inputs = inputs
        self._polarity: dict[fx.Node, bool] = {}

    def visible(self, sizes: Sizes, inputs: dict[fx.Node, Tensor]) -> Tensor:
        """Return which keys are visible, as (B or 1, H or 1, T, S) booleans."""
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)

        for term in self.hard:
            hidden = self._is_hidden(term, sizes, inputs)
            own = broadcast_layout(term.layout, tuple(hidden.shape))
            visible = visible & ~_to_bhts(hidden, own, term.layout)
        if self.match.structure.kind != "none":
            queries, keys = visible.shape[-2:]
            queries, keys = (
                max(queries, self.length("T", sizes)),
                max(keys, self.length("S", sizes)),
            )
            visible = visible & shown_by(self.match.structure, queries, keys)
        return visible

    def visible_scores(self) -> Tensor | None:
        """Return what no mask hides in the shape of the scores, where the masks are written there.

        Padding hides nothing here.
        """
        if any(t.layout != self.match.scores_layout for t in self.hard):
            return None
        sizes = self.view.shapes.captured
        held = tuple(_product(f.size for f in axis) for axis in self.match.scores_layout.axes)
        visible = torch.ones(held, dtype=torch.bool)
        for term in self.hard:
            visible = visible & ~self._is_hidden(term, sizes, self.all_visible(sizes))
        return visible

    def _is_hidden(self, term: Term, sizes: Sizes, inputs: dict[fx.Node, Tensor]) -> Tensor:
        found = self.numbers(term, sizes, inputs)
        hidden = found != 0 if term.op == "hide" else term.is_hard(found)
        return hidden == term.when

    def numbers(self, term: Term, sizes: Sizes, inputs: dict[fx.Node, Tensor]) -> Tensor:
        """Evaluate a term, with zeros for what its mask is written over."""

        def leaf(node: fx.Node) -> Tensor:
            if node in term.ends:
                return torch.zeros(self.view.shapes.shape(node, sizes), dtype=value(node).dtype)
            return inputs[node] if node in inputs else self._default(node, sizes)

        (found,) = evaluate([term.node], leaf, sizes=sizes, stop=term.ends)
        assert isinstance(found, Tensor)
        return found

    def _default(self, node: fx.Node, sizes: Sizes) -> Tensor:
        binding = self.program.bindings[node.name]
        if binding.kind in ("parameter", "buffer", "constant"):
            return self.program.weights[binding.name]
        example = value(node)
        size = self.view.shapes.shape(node, sizes)
        if binding.name.split(".")[-1] in ("position_ids", "cache_position"):
            past = sizes.get(self.past, 0) if self.past is not None else 0
            return (torch.arange(size[-1]) + past).expand(size)
        if example.is_floating_point():
            return torch.zeros(size, dtype=example.dtype)
        return torch.ones(size, dtype=example.dtype)

    @property
    def past(self) -> sympy.Symbol | None:
        """The length of what was seen before, where a program has states."""
        return next(filter(self.is_past, self.view.shapes.sources), None)

    def is_past(self, symbol: sympy.Symbol) -> bool:
        """Tell whether a size is the length of a state."""
        node, _ = self.view.shapes.sources[symbol]
        return self.program.bindings[node.name].kind in ("past_length", "state")

    def length(self, role: str, sizes: Sizes) -> int:
        """Return the number of queries or keys at the given sizes."""
        operand = self.match.q if role == "T" else self.match.k
        found = self.view.shapes.shape(operand.product, sizes)
        held = self.layout_of(operand)
        total = 1
        for size, axis in zip(found, held.axes, strict=True):
            if any(f.role == role for f in axis):
                # Heads or the batch may share the axis.
                total *= size // _product(f.size for f in axis if f.role != role)
        return total

    def layout_of(self, operand: Operand) -> Layout:
        """Return which axes of an operand are those of the scores."""
        by_label = dict(
            zip(self.match.contraction.out_labels, self.match.scores_layout.axes, strict=True)
        )
        return Layout(tuple(by_label.get(x, ()) for x in operand.labels))

    def all_visible(self, sizes: Sizes) -> dict[fx.Node, Tensor]:
        """Give each mask input the value that hides nothing: ones, or zeros."""
        return {
            n: torch.full_like(self._default(n, sizes), 1 if self.ones_show(n) else 0)
            for n in self.inputs
        }

    def ones_show(self, node: fx.Node) -> bool:
        """Tell a mask whose ones are visible from one whose zeros are (an additive one, too)."""
        if node not in self._polarity:
            sizes = self.view.shapes.captured
            shown = {}
            for fill in (0, 1):
                given = {n: torch.ones_like(self._default(n, sizes)) for n in self.inputs}
                given[node] = torch.full_like(given[node], fill)
                shown[fill] = int(self.visible(sizes, given).sum())
            additive = value(node).is_floating_point() and shown[1] == shown[0]
            self._polarity[node] = shown[1] >= shown[0] and not additive
        return self._polarity[node]

    def random_masks(self, sizes: Sizes, seed: int, *, right: bool) -> dict[fx.Node, Tensor]:
        """Draw all mask inputs at random."""
        generator = torch.Generator().manual_seed(seed)
        return {n: self.random_mask(n, sizes, generator, right) for n in self.inputs}

    def random_mask(
        self, node: fx.Node, sizes: Sizes, generator: torch.Generator, right: bool
    ) -> Tensor:
        """Draw a mask input at random; with `right` only the end of each row is hidden.

        Otherwise each row hides a run besides, which a mask of pooled tokens shows.
        """
        example = value(node)
        size = self.view.shapes.shape(node, sizes)
        shown = torch.rand(size, generator=generator) < 0.7
        *rows, length = size or (1,)
        place = torch.arange(length)
        if right:
            last = torch.randint(1, length + 1, (*rows, 1), generator=generator)
            shown = place < last
        elif rows and length > 1:
            first = torch.randint(0, length, (*rows, 1), generator=generator)
            shown &= (place < first) | (place >= first + length // 2)
        if self.ones_show(node):
            return shown.to(example.dtype)
        if example.is_floating_point():
            least = torch.finfo(example.dtype).min
            return torch.zeros(size, dtype=example.dtype).masked_fill(~shown, least)
        return (~shown).to(example.dtype)


def broadcast_layout(layout: Layout, sizes: tuple[int, ...]) -> Layout:
    """Return the layout of a tensor that broadcasts into a stage."""
    axes = layout.axes[len(layout.axes) - len(sizes) :]
    return Layout(tuple(a if s > 1 else () for a, s in zip(axes, sizes, strict=True)))


def _to_bhts(hidden: Tensor, own: Layout, full: Layout) -> Tensor:
    """Bring a broadcasting tensor to (B, H, T, S)."""
    if hidden.dim() == 0:
        return hidden.view(1, 1, 1, 1)
    groups: list[list[int]] = []
    covered: set[str] = set()
    for role in "BHTS":
        axes = [i for i, a in enumerate(own.axes) if a and a[0].role == role]
        groups.append(sorted(axes, key=lambda i: -own.axes[i][0].stride))
        if axes and sum(f.size > 1 for f in own.factors(role)) < len(full.factors(role)):
            covered.add(role)
    if covered or any(len(a) > 1 for a in own.axes):
        return _expanded_bhts(hidden, own, full, covered)
    used = [i for g in groups for i in g]
    rest = [i for i in range(hidden.dim()) if i not in used]
    sizes = [_product(hidden.shape[i] for i in g) for g in groups]
    return hidden.permute(*rest, *used).reshape(sizes)


def _expanded_bhts(hidden: Tensor, own: Layout, full: Layout, roles: set[str]) -> Tensor:
    lead = len(full.axes) - hidden.dim()
    hidden = hidden.reshape((1,) * lead + tuple(hidden.shape))
    sizes = [
        _product(f.size for f in a)
        if a and hidden.shape[i] == 1 and any(f.role in roles for f in a)
        else -1
        for i, a in enumerate(full.axes)
    ]
    hidden = hidden.expand(sizes)
    axes = tuple(a if s > 1 else () for a, s in zip(full.axes, hidden.shape, strict=True))
    return canonical_numbers(hidden, Layout(axes), "BHTS")


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
