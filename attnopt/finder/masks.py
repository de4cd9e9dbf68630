"""Name masks by evaluating them: at sizes from their own constants, with and without padding.

Whatever ops spell a mask, its values say what it is. Terms that positions alone decide are
evaluated as they are; terms that read a padding mask are evaluated with all ones, then with random
masks, and must split into structure AND padding. Soft terms are biases, not masks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import Sizes, ancestors, evaluate, is_size, leaves
from attnopt.finder.layout import Layout
from attnopt.finder.match import Match, Operand, Side
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import (
    LAYOUT,
    TRANSPARENT,
    args,
    argument,
    is_number,
    kind,
    module_path,
    shape,
    value,
)
from attnopt.finder.provenance import View
from attnopt.finder.scores import HARD
from attnopt.finder.structures import name_structure
from attnopt.finder.structures import structure as shown_by
from attnopt.nouns import Mask

Bias = Literal["none", "alibi", "relative", "table", "dense"]

MOVED = "padding at the left moves the structure along"

_BROADCASTING = frozenset(
    "expand expand_as unsqueeze slice view reshape broadcast_to to _to_copy".split()
)
_FILLING = frozenset("masked_fill where full full_like new_full mul scalar_tensor slice".split())
_MOVES = LAYOUT - frozenset("getitem gather index take_along_dim constant_pad_nd pad".split())
_PADDING_TRIALS = 8
_LONG_TRIALS = 3
_LARGEST_SQUARE = 8200
_LARGEST_PADDED_SQUARE = 2100
_LARGEST_INTEGER = 65536
_LARGEST_POSITION = 1e9
# What a mask's own code raises at sizes that it was not written for: nothing is known of it there.
CANNOT_RUN = (RuntimeError, IndexError, KeyError, ValueError, TypeError)


@dataclass(frozen=True)
class Term:
    """A part of what is added to, or hides, the scores.

    `under` is what data decide, where this term only writes a mask over it.
    """

    node: fx.Node
    op: str
    when: bool
    factor: float
    layout: Layout
    under: fx.Node | None = None

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """Return where the term's own subgraph ends: at what the mask is written over."""
        return () if self.under is None else (self.under,)

    def is_hard(self, numbers: Tensor) -> Tensor:
        """Tell which numbers hide: as they are written, or as they are multiplied after it."""
        return numbers * math.copysign(max(abs(self.factor), 1.0), self.factor) <= HARD

    def nodes(self) -> list[fx.Node]:
        """List the term's own subgraph, in order of execution."""
        return [n for n in ancestors([self.node], self.ends) if n not in self.ends]


@dataclass(frozen=True)
class Named:
    """What the side operands of a site amount to."""

    mask: Mask
    padded: bool
    bias: Bias
    notes: tuple[str, ...] = ()


def name_masks(view: View, match: Match) -> Named:
    """Name the structure, the padding and the bias of a site."""
    return MaskReader(view, match).read()


def split_terms(side: Side) -> list[Term]:
    """Split a side operand into the terms that are added up in it."""
    step = side.step
    if step.op != "add":
        return [Term(side.node, step.op, step.when, 1.0, side.layout)]
    return [Term(n, "add", True, side.factor, side.layout) for n in _summands(side.node)]


def _summands(node: fx.Node) -> list[fx.Node]:
    """Follow sums, casts and broadcasts down to the terms, each a tensor that broadcasts."""
    inner = node
    while kind(inner) in _BROADCASTING | TRANSPARENT and isinstance(args(inner)[0], fx.Node):
        if kind(inner) in LAYOUT and not _keeps_axes(inner):
            break
        inner = args(inner)[0]
    if kind(inner) == "add" and argument(inner, 2, "alpha", 1) == 1:
        parts = [a for a in args(inner)[:2] if isinstance(a, fx.Node)]
        if len(parts) == 2 and all(isinstance(value(p), Tensor) for p in parts):
            return [term for p in parts for term in _summands(p)]
    return [inner]


def _keeps_axes(node: fx.Node) -> bool:
    """Tell whether a layout op only broadcasts: its input could stand in its place."""
    before, after = shape(args(node)[0]), shape(node)
    if kind(node) == "unsqueeze" and args(node)[1] not in (0,):
        return False
    lead = len(after) - len(before)
    return lead >= 0 and all(b in (1, a) for b, a in zip(before, after[lead:], strict=True))


class MaskReader:
    """Evaluates the terms of one site."""

    def __init__(self, view: View, match: Match) -> None:
        self.view = view
        self.match = match
        self.program = view.program
        self.polarity: dict[fx.Node, bool] = {}
        terms = [t for side in match.sides if side.step.op != "multiply" for t in split_terms(side)]
        self.hard: list[Term] = []
        self.soft: list[Term] = []
        for term in terms:
            under = None if self._decidable(term.node) else self._under_mask(term)
            if under is not None:
                self.hard.append(replace(term, under=under))
                self.soft.append(replace(term, node=under))
            else:
                (self.hard if self._decidable(term.node) else self.soft).append(term)
        self.inputs = self._mask_inputs()

    def read(self) -> Named:
        """Evaluate, name, and test for padding."""
        notes: list[str] = []
        # A data-dependent term that hides keys cannot be named; one that adds is a bias.
        if any(t.op == "hide" for t in self.soft):
            return Named(
                Mask("dense"), bool(self.inputs), self._bias(notes), ("the mask depends on data",)
            )
        structure, padded, said = self.name_hard()
        if any(self._hides(t.node) for t in self.soft):
            structure, said = Mask("dense"), (*said, "the mask depends on data")
        return Named(structure, padded, self._bias(notes), (*said, *notes))

    def name_hard(self) -> tuple[Mask, bool, tuple[str, ...]]:
        """Name what hides keys: the structure, whether inputs hide more, and what is odd."""
        key = self._key()
        if key not in self.view.masks:
            self.view.masks[key] = self._hard()
        found: tuple[Mask, bool, tuple[str, ...]] = self.view.masks[key]
        return found

    def _hard(self) -> tuple[Mask, bool, tuple[str, ...]]:
        notes: list[str] = []
        structure = self._structure(notes)
        if not self.inputs or notes:
            return structure, False, tuple(notes)
        padded, exact = self._padding(structure, right=False)
        if exact:
            return structure, padded, ()
        if self._padding(structure, right=True)[1]:
            return structure, padded, (MOVED,)
        return Mask("dense"), padded, ("the mask is not structure AND padding",)

    def _key(self) -> tuple[object, ...]:
        """Identify a mask that several layers share, which is named once."""
        match = self.match
        shapes = tuple(shape(x.product) for x in (match.q, match.k))
        return (tuple(self.hard), match.structure, match.scores_layout, shapes)

    # ------------------------------------------------------------------------- dependencies

    def _decidable(self, node: fx.Node) -> bool:
        """Tell whether positions, constants and mask inputs decide a term."""
        flags = self.view.origins.of(node)
        if flags & {"parameter", "state"} or self._reads_tokens(node):
            return False
        return "data" not in flags or all(_is_key_mask(n) for n in self._data_inputs(node))

    def _under_mask(self, term: Term) -> fx.Node | None:
        """Return the data that a decidable mask is written over; None where there is no such."""
        node, masked = term.node, False
        while term.op == "add":
            under = next((x for x in _fills(node) if self._is_mask(*x[:2])), None)
            if under is not None:
                node, masked = under[2], True
            elif kind(node) in _MOVES | TRANSPARENT and isinstance(args(node)[0], fx.Node):
                node = args(node)[0]
            else:
                break
        return node if masked else None

    def _is_mask(self, condition: fx.Node, fill: Any) -> bool:
        """Tell whether writing `fill` where `condition` is hides keys that positions decide."""
        number = self.view.scalars.scalar(fill, uniform=True)
        return number is not None and number <= HARD and self._decidable(condition)

    def _data_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in leaves([node]) if "data" in self.view.origins.of(n)]

    def _hides(self, node: fx.Node) -> bool:
        """Tell whether a term that data decide writes a mask's value somewhere in its module."""
        todo, seen = [node], set[fx.Node]()
        while todo:
            n = todo.pop()
            if n in seen or is_size(n) or module_path(n) != self.match.module:
                continue
            seen.add(n)
            fill = n.args[2] if kind(n) in ("masked_fill", "where") and len(n.args) > 2 else None
            if isinstance(fill, int | float) and fill <= HARD:
                return True
            todo.extend(n.all_input_nodes)
        return False

    def _reads_tokens(self, node: fx.Node) -> bool:
        """Tell whether integer inputs matter: one of another role than ids is a mask input."""
        names = {
            self.program.bindings[n.name].name for n in leaves([node]) if n.op == "placeholder"
        }
        return bool(names & {"input_ids", "decoder_input_ids"})

    def _mask_inputs(self) -> list[fx.Node]:
        found = {n for t in self.hard for n in leaves([t.node], t.ends)} - {
            t.under for t in self.hard
        }
        return [
            n
            for n in sorted(found)
            if self.program.bindings[n.name].kind == "input"
            and self.program.bindings[n.name].name.split(".")[-1]
            not in ("position_ids", "cache_position")
        ]

    # --------------------------------------------------------------------------- evaluation

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
                max(queries, self._length("T", sizes)),
                max(keys, self._length("S", sizes)),
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
            visible = visible & ~self._is_hidden(term, sizes, self._all_visible(sizes))
        return visible

    def _is_hidden(self, term: Term, sizes: Sizes, inputs: dict[fx.Node, Tensor]) -> Tensor:
        found = self._value(term, sizes, inputs)
        hidden = found != 0 if term.op == "hide" else term.is_hard(found)
        return hidden == term.when

    def _value(self, term: Term, sizes: Sizes, inputs: dict[fx.Node, Tensor]) -> Tensor:
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
            past = sizes.get(self._past, 0) if self._past is not None else 0
            return (torch.arange(size[-1]) + past).expand(size)
        if example.is_floating_point():
            return torch.zeros(size, dtype=example.dtype)
        return torch.ones(size, dtype=example.dtype)

    @property
    def _past(self) -> sympy.Symbol | None:
        return next(filter(self._is_past, self.view.shapes.sources), None)

    def _is_past(self, symbol: sympy.Symbol) -> bool:
        """Tell whether a size is the length of a state."""
        node, _ = self.view.shapes.sources[symbol]
        return self.program.bindings[node.name].kind in ("past_length", "state")

    def _length(self, role: str, sizes: Sizes) -> int:
        """Return the number of queries or keys at the given sizes."""
        operand = self.match.q if role == "T" else self.match.k
        found = self.view.shapes.shape(operand.product, sizes)
        held = self._layout_of(operand)
        total = 1
        for size, axis in zip(found, held.axes, strict=True):
            if any(f.role == role for f in axis):
                # Heads or the batch may share the axis.
                total *= size // _product(f.size for f in axis if f.role != role)
        return total

    def _layout_of(self, operand: Operand) -> Layout:
        by_label = dict(
            zip(self.match.contraction.out_labels, self.match.scores_layout.axes, strict=True)
        )
        return Layout(tuple(by_label.get(x, ()) for x in operand.labels))

    # ----------------------------------------------------------------------------- structure

    def _structure(self, notes: list[str]) -> Mask:
        if not self.hard and self.match.structure.kind == "none":
            return Mask("none")
        if self.match.structure.kind == "dense":
            through_agents = "agents" in self.match.anchor.kwargs
            met = "tokens of a grid meet through agents"
            seen = "each token sees its neighbourhood on a grid"
            notes.append(met if through_agents else seen)
            return self.match.structure
        shown: list[tuple[Tensor, int]] = []
        for sizes in self._trials():
            try:
                visible = self.visible(sizes, self._all_visible(sizes))
                full = self._full(visible, sizes)
            except (RuntimeError, IndexError, KeyError, ValueError, TypeError, ZeroDivisionError):
                continue
            if full is None:
                return Mask("dense")
            shown.append((full, full.shape[-1] - full.shape[-2]))
        if not shown:
            notes.append("the mask could not be evaluated")
            return Mask("dense")
        return name_structure([v for v, _ in shown])

    def _full(self, visible: Tensor, sizes: Sizes) -> Tensor | None:
        """Return the (T, S) structure; None where rows of the batch or heads differ."""
        first = visible[0, 0]
        if not (visible == first).all():
            return None
        queries, keys = self._length("T", sizes), self._length("S", sizes)
        return first.expand(queries, keys)

    def _all_visible(self, sizes: Sizes) -> dict[fx.Node, Tensor]:
        """Give each mask input the value that hides nothing: ones, or zeros."""
        return {
            n: torch.full_like(self._default(n, sizes), 1 if self.ones_show(n) else 0)
            for n in self.inputs
        }

    def ones_show(self, node: fx.Node) -> bool:
        """Tell a mask whose ones are visible from one whose zeros are (an additive one, too)."""
        if node not in self.polarity:
            sizes = self.view.shapes.captured
            shown = {}
            for fill in (0, 1):
                given = {n: torch.ones_like(self._default(n, sizes)) for n in self.inputs}
                given[node] = torch.full_like(given[node], fill)
                shown[fill] = int(self.visible(sizes, given).sum())
            additive = value(node).is_floating_point() and shown[1] == shown[0]
            self.polarity[node] = shown[1] >= shown[0] and not additive
        return self.polarity[node]

    def _trials(self) -> Iterator[Sizes]:
        """Yield sizes: those of the capture, small ones, and ones around every constant.

        With a state, a few rows after a long past show what a square mask would.
        """
        yield dict(self.view.shapes.captured)
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
        captured = self.view.shapes.captured
        old, old_past = captured[query], captured[past] if past is not None else 0
        follow = {old: length, old + old_past: length + before}
        if past is not None:
            follow[old_past] = before
        sources = self.view.shapes.sources
        return {
            s: size if s not in sources or sources[s][1] == 0 else follow.get(size, size)
            for s, size in captured.items()
        }

    def _length_symbols(self) -> tuple[list[sympy.Symbol], sympy.Symbol | None] | None:
        """Find the symbols that lengths of queries and keys are made of."""
        past = self._past
        used: set[sympy.Symbol] = set()
        for role, operand in (("T", self.match.q), ("S", self.match.k)):
            pairs = zip(value(operand.product).shape, self._layout_of(operand).axes, strict=True)
            for size, axis in pairs:
                if any(f.role == role for f in axis) and isinstance(size, torch.SymInt):
                    used |= size.node.expr.free_symbols
        sources = self.view.shapes.sources
        # Every state has a past of its own, and keys are as long as that and the queries together.
        queries = [s for s in sources if s in used and not self._is_past(s)]
        return (queries, past) if queries else None

    def _constants(self) -> set[int]:
        """Collect the integers in the mask's own subgraph, and their neighbours."""
        named = self.match.structure
        found = _integers([n for n in (named.window, named.right, named.prefix) if n is not None])
        for node in {n for term in self.hard for n in term.nodes()}:
            if node.op == "placeholder" and not is_size(node):
                binding = self.program.bindings[node.name]
                if binding.kind in ("buffer", "constant"):
                    found |= _stored_integers(self.program.weights[binding.name])
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
        nodes = [n for t in self.hard for n in t.nodes() if kind(n) not in _FILLING]
        given: list[Any] = [a for n in nodes for a in (*args(n), *n.kwargs.values())]
        return not any(is_number(a) and most < abs(a) < _LARGEST_POSITION for a in given)

    # ------------------------------------------------------------------------------ padding

    def _padding(self, structure: Mask, *, right: bool) -> tuple[bool, bool]:
        """Return whether inputs hide keys, and whether they do nothing else.

        With `right`, only padding at the end of rows is tried.
        """
        padded = False
        exact = True
        base = torch.ones(())
        tried: Sizes | None = None
        for sizes, seed in self.padding_trials(structure):
            try:
                if sizes is not tried:
                    base, tried = self.visible(sizes, self._all_visible(sizes)), sizes
                visible = self.visible(sizes, self.random_masks(sizes, seed, right=right))
            except CANNOT_RUN:
                return True, False
            shape_ = torch.broadcast_shapes(base.shape, visible.shape)
            visible, plain = visible.expand(shape_), base.expand(shape_)
            padded = padded or not torch.equal(visible, plain)
            exact = exact and _is_padding(visible, plain)
            if not exact:
                break
        return padded, exact

    def padding_trials(self, structure: Mask) -> Iterator[tuple[Sizes, int]]:
        """Yield sizes and seeds to try mask inputs with.

        Where a structure is longer than what was captured, there are longer ones, too.
        """
        for seed in range(_PADDING_TRIALS):
            yield self.view.shapes.captured, seed
        longer = self._beyond(structure)
        if longer is not None:
            for seed in range(_LONG_TRIALS):
                yield longer, seed

    def _beyond(self, structure: Mask) -> Sizes | None:
        """Return sizes at which a structure shows that the capture is too short for."""
        named = (structure.window, structure.right, structure.prefix, structure.first)
        length = 2 * max((n for n in named if n is not None), default=0) + 1
        found = self._length_symbols()
        if found is None or length <= self._length("S", self.view.shapes.captured):
            return None
        queries, past = found
        if past is not None:
            rows = min(3, length)
            return self._sized(queries[0], rows, past, length - rows)
        return (
            self._sized(queries[0], length, None, 0) if length <= _LARGEST_PADDED_SQUARE else None
        )

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

    # --------------------------------------------------------------------------------- bias

    def _bias(self, notes: list[str]) -> Bias:
        """Name what is added softly."""
        kinds: set[Bias] = set()
        for term in self.soft:
            if term.op == "add":
                kinds.add(self._soft_kind(term))
        for term in self.hard:
            if term.op == "add" and (soft := self.soft_remainder(term)) is not None:
                kinds.add(soft)
        if not kinds:
            return "none"
        if len(kinds) > 1:
            notes.append(f"several biases: {', '.join(sorted(kinds))}")
        return next(b for b in ("dense", "relative", "table", "alibi") if b in kinds)

    def _soft_kind(self, term: Term) -> Bias:
        flags = self.view.origins.of(term.node)
        if flags & {"data", "tokens", "state"}:
            return "dense"
        ops = {kind(n) for n in ancestors([term.node])}
        if "embedding" in ops:
            return "relative"
        return "table" if ops & {"index", "gather", "index_select"} else "dense"

    def soft_remainder(self, term: Term) -> Bias | None:
        """Return the bias in a term that positions decide; None where it only hides."""
        sizes = self.view.shapes.captured
        try:
            found = self._value(term, sizes, self._all_visible(sizes))
        except CANNOT_RUN:
            return "dense"
        soft = found[~term.is_hard(found)]
        if soft.numel() == 0 or not (soft != 0).any():
            return None
        rounding = max(_precision(n) for n in term.nodes())
        return "alibi" if _has_slopes(found.double(), rounding) else "dense"


def _precision(node: fx.Node) -> float:
    """Return the relative rounding of a node's numbers; 0 for integers and booleans."""
    example = value(node)
    real = isinstance(example, Tensor) and example.is_floating_point()
    return float(torch.finfo(example.dtype).eps) if real else 0.0


def _has_slopes(bias: Tensor, rounding: float) -> bool:
    """Tell whether each row is linear in the distance of the key, with a slope of its own."""
    rows = bias.reshape(-1, bias.shape[-1]) if bias.dim() else bias.reshape(1, 1)
    seen = rows > HARD
    step = (rows[:, 1:] - rows[:, :-1]).abs()
    for row, values, kept in zip(step, rows, seen[:, 1:] & seen[:, :-1], strict=True):
        climbs = row[kept]
        if climbs.numel() < 2:
            continue
        largest = values[values > HARD].abs().max()
        allowed = max(1e-4 * max(1.0, float(climbs.max())), 2 * rounding * float(largest))
        if (climbs - climbs[0]).abs().max() > allowed:
            return False
    return True


def _fills(node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node]]:
    """List how a node may be read as (condition, what is written, over what)."""
    given = args(node)
    read = {
        "masked_fill": [(1, 2, 0)],
        "where": [(0, 1, 2), (0, 2, 1)],
    }.get(kind(node), [])
    found = [(given[c], given[f], given[o]) for c, f, o in read if len(given) == 3]
    return [x for x in found if isinstance(x[0], fx.Node) and isinstance(x[2], fx.Node)]


def _is_key_mask(node: fx.Node) -> bool:
    """Tell a given float mask over keys from a bias over queries and keys."""
    sizes = shape(node)
    return len(sizes) <= 2 or sizes[-2] == 1


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


def _is_padding(visible: Tensor, plain: Tensor) -> bool:
    """Tell whether what is hidden beyond the structure is whole keys of a batch row.

    Queries that see nothing are not compared: they are padding themselves.
    """
    alive = visible.any(dim=-1, keepdim=True)
    lost = plain & ~visible & alive
    kept = visible & alive
    if (visible & ~plain & alive).any():
        return False
    hidden_key = lost.any(dim=-2, keepdim=True)
    return not bool((kept & hidden_key).any())
