"""Name masks by evaluating them: at sizes from their own constants, with and without padding.

Whatever ops spell a mask, its values say what it is. Terms that positions alone decide are
evaluated as they are; terms that read a padding mask are evaluated with all ones, then with random
masks, and must split into structure AND padding. Soft terms are biases, not masks.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import Sizes, ancestors, is_size, leaves
from attnopt.finder.mask_terms import Term, fills, split_terms
from attnopt.finder.mask_trials import Trials
from attnopt.finder.mask_values import MaskValues
from attnopt.finder.match import Match
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, kind, module_path, shape, value
from attnopt.finder.provenance import View
from attnopt.finder.scores import HARD
from attnopt.finder.structures import name_structure
from attnopt.nouns import Mask

Bias = Literal["none", "alibi", "relative", "table", "dense"]

MOVED = "padding at the left moves the structure along"

_MOVES = LAYOUT - frozenset("getitem gather index take_along_dim constant_pad_nd pad".split())
# What a mask's own code raises at sizes that it was not written for: nothing is known of it there.
CANNOT_RUN = (RuntimeError, IndexError, KeyError, ValueError, TypeError)


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


class MaskReader:
    """Reads the terms of one site: what hides keys, by its values, and what only adds to scores."""

    def __init__(self, view: View, match: Match) -> None:
        self.view = view
        self.match = match
        self.program = view.program
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
        self.values = MaskValues(view, match, self.hard, self.inputs)
        self.trials = Trials(self.values)

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
            under = next((x for x in fills(node) if self._is_mask(*x[:2])), None)
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
        for sizes in self.trials.structural():
            try:
                visible = self.values.visible(sizes, self.values.all_visible(sizes))
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
        queries, keys = self.values.length("T", sizes), self.values.length("S", sizes)
        return first.expand(queries, keys)

    def _padding(self, structure: Mask, *, right: bool) -> tuple[bool, bool]:
        """Return whether inputs hide keys, and whether they do nothing else.

        With `right`, only padding at the end of rows is tried.
        """
        padded = False
        exact = True
        base = torch.ones(())
        tried: Sizes | None = None
        for sizes, seed in self.trials.with_padding(structure):
            try:
                if sizes is not tried:
                    base, tried = self.values.visible(sizes, self.values.all_visible(sizes)), sizes
                visible = self.values.visible(
                    sizes, self.values.random_masks(sizes, seed, right=right)
                )
            except CANNOT_RUN:
                return True, False
            shape_ = torch.broadcast_shapes(base.shape, visible.shape)
            visible, plain = visible.expand(shape_), base.expand(shape_)
            padded = padded or not torch.equal(visible, plain)
            exact = exact and _is_padding(visible, plain)
            if not exact:
                break
        return padded, exact

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
            found = self.values.numbers(term, sizes, self.values.all_visible(sizes))
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


def _is_key_mask(node: fx.Node) -> bool:
    """Tell a given float mask over keys from a bias over queries and keys."""
    sizes = shape(node)
    return len(sizes) <= 2 or sizes[-2] == 1


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
