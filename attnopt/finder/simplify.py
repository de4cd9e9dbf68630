"""Say the masks of a match as a structure and a padding mask, where that is what they amount to.

A mask of (T, S) elements then need not be made: the canonical op says in numbers which keys
positions hide, and the padding mask has one element a key.
"""

from dataclasses import replace

import torch
from torch import fx

from attnopt.finder.evaluate import Sizes, leaves
from attnopt.finder.mask_terms import split_terms
from attnopt.finder.masks import CANNOT_RUN, MOVED, MaskReader
from attnopt.finder.match import Match, Padding, Side
from attnopt.finder.ops import value
from attnopt.finder.provenance import View
from attnopt.finder.structures import structure
from attnopt.nouns import Mask


def simplify(view: View, match: Match) -> Match:
    """Return the match with its masks said by name; the same match where they have none.

    The names are read off queries that see a key; what the rest gives is up to the proof.
    """
    reader = MaskReader(view, match)
    if not reader.hard or any(t.under is not None for t in reader.hard):
        # A mask that is written over data stays with them.
        return match
    named, padded, notes = reader.name_hard()
    if named.kind == "dense" or notes or not reader.trials.covers_its_constants():
        return match
    given = [n for n in leaves([t.node for t in reader.hard]) if _is_input(view, n)]
    if not padded and not given:
        return _without_masks(reader, match, named, None)
    if len(given) != 1 or not _hides_keys_alone(reader, named, given[0]):
        return match
    padding = Padding(given[0], inverted=not reader.values.ones_show(given[0])) if padded else None
    return _without_masks(reader, match, named, padding)


def reach(view: View, match: Match) -> Mask | None:
    """Return the window that all keys lie in which a mask shows, where padding moves its chunks.

    The mask itself has to stay. None where no window is known, or a mask is added to the scores:
    what that gives to queries without a key, all keys have a part in.
    """
    reader = MaskReader(view, match)
    if not reader.hard or any(t.op != "hide" or t.under is not None for t in reader.hard):
        return None
    named, _, notes = reader.name_hard()
    if named.kind != "chunked" or notes != (MOVED,) or not reader.trials.covers_its_constants():
        return None
    window = Mask("sliding", window=named.window)
    for sizes, seed in reader.trials.with_padding(named):
        try:
            seen = reader.values.visible(
                sizes, reader.values.random_masks(sizes, seed, right=False)
            )
        except CANNOT_RUN:
            return None
        if (seen & ~structure(window, *seen.shape[-2:])).any():
            return None
    return window


def _is_input(view: View, node: fx.Node) -> bool:
    return view.program.bindings[node.name].kind not in ("parameter", "buffer", "constant")


def _hides_keys_alone(reader: MaskReader, named: Mask, given: fx.Node) -> bool:
    """Tell whether hiding keys of the structure by an input of (B, S) gives the mask."""
    example = value(given)
    if given not in reader.inputs or example.dim() != 2 or example.is_floating_point():
        return False
    return all(
        _agrees(reader, named, given, sizes, seed)
        for sizes, seed in reader.trials.with_padding(named)
    )


def _agrees(reader: MaskReader, named: Mask, given: fx.Node, sizes: Sizes, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    drawn = reader.values.random_mask(given, sizes, generator, right=False)
    try:
        want = reader.values.visible(sizes, {given: drawn})
    except CANNOT_RUN:
        return False
    shown = ((drawn != 0) == reader.values.ones_show(given))[:, None, None, :]
    if want.shape[-1] != shown.shape[-1] or want.shape[0] not in (1, shown.shape[0]):
        return False
    got = structure(named, *want.shape[-2:]) & shown
    alive = want.any(dim=-1, keepdim=True)
    return torch.equal(*torch.broadcast_tensors(want & alive, got & alive))


def _without_masks(reader: MaskReader, match: Match, named: Mask, padding: Padding | None) -> Match:
    """Leave out the terms that only hide keys; what they add besides stays."""
    hard = {t.node for t in reader.hard if t.op == "hide" or reader.soft_remainder(t) is None}
    sides: list[Side] = []
    for side in match.sides:
        terms = [] if side.step.op == "multiply" else split_terms(side)
        if not any(t.node in hard for t in terms):
            sides.append(side)
            continue
        kept = [t.node for t in terms if t.node not in hard]
        sides.extend(replace(side, step=replace(side.step, side=node)) for node in kept)
    return replace(match, sides=tuple(sides), structure=named, padding=padding)
