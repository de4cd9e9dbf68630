"""Attention by blocks of queries and the keys that each of them can see.

Within a window all blocks in the middle of a text see as many keys, so that one call of the kernel
does them all: the keys are a view in which blocks overlap, and nothing is copied. What is left at
either end is done block by block, and so is what chunks, a prefix or a mask of all pairs leave of
the keys: a block reads those from the first that one of its queries sees to the last.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.extents import extents, shown_pairs
from attnopt.ops.hidden import Hidden, Keys, Memo, Structure, joined, remembered
from attnopt.ops.kernels import Scoring, kernel

# Blocks have a sixteenth of a window's queries, within these bounds, and see a multiple of so many
# keys, which the kernel's products want.
_LEAST, _MOST = 32, 256
_ALIGNED = 64
_CUT = 128
# So many blocks are attended to at once, that their results are in the cache when they are copied.
_AT_ONCE = 16
# What is skipped of the scores must be worth it.
_LEAST_SKIPPED = 0.3
# Below so many pairs of a query and a key, a mask is applied faster than it is read.
_LEAST_PAIRS = 2**18


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that any of them sees; `causal` where each sees all before it."""

    queries: slice
    keys: Keys
    causal: bool = False

    @property
    def count(self) -> int:
        """How many queries they are."""
        size: int = self.queries.stop - self.queries.start
        return size


@dataclass(frozen=True)
class Bands:
    """Queries cut into equal blocks in the middle, and blocks of their own at the ends.

    The middle begins at a query and has so many blocks of `size`; each sees the `first` keys of all
    and `width` more, those of the first block from `start` on.
    """

    ends: tuple[_Block, ...]
    middle: int
    blocks: int
    size: int
    start: int
    width: int
    first: int

    @property
    def scores(self) -> int:
        """How many scores are computed for one head."""
        return self.blocks * self.size * self.width + sum(b.count * b.keys.count for b in self.ends)


def bands(queries: int, keys: int, hidden: Hidden) -> Bands | None:
    """Cut the queries where that skips enough keys; None where it does not.

    Masks and biases that are not of positions alone differ from block to block.
    """
    structure = hidden.structure
    whole = structure.chunk is None and structure.prefix is None
    if structure == Structure() or (structure.window is not None and not whole):
        return None
    if structure.window is None or hidden.mask is not None or hidden.bias is not None:
        found = _in_blocks(_cut(0, queries, keys - queries, keys, structure))
    else:
        found = _bands(queries, keys, hidden, structure.window)
    return found if found.scores <= (1 - _LEAST_SKIPPED) * queries * keys else None


def _in_blocks(blocks: list[_Block]) -> Bands:
    """Return blocks of their own alone."""
    return Bands(tuple(blocks), 0, 0, 0, 0, 0, 0)


def _bands(queries: int, keys: int, hidden: Hidden, window: int) -> Bands:
    structure, before = hidden.structure, keys - queries
    size = min(max(_LEAST, window // 16), _MOST)
    back = window - (1 if structure.right is None else 0)
    ahead = structure.right or 0
    back += -(back + size + ahead) % _ALIGNED
    # A block belongs to the middle where its window is cut off at neither end.
    head = -(-max(back + (structure.first or 0) - before, 0) // size)
    tail = max((queries - ahead) // size, head)
    first, last = min(head * size, queries), min(tail * size, queries)
    if hidden.padding is None and structure.ends and not before and first <= window:
        begin = [_Block(slice(0, first), Keys(0, 0, first), causal=True)] if first else []
    else:
        begin = _cut(0, first, before, keys, structure)
    ends = (*begin, *_cut(last, queries, before, keys, structure))
    start, width = before + first - back, back + size + ahead
    return Bands(ends, first, (last - first) // size, size, start, width, structure.first or 0)


def _cut(start: int, stop: int, before: int, keys: int, structure: Structure) -> list[_Block]:
    """Cut a stretch of queries into blocks, each with the keys that it sees."""
    found: list[_Block] = []
    size = max(_CUT, (structure.window or 0) // 2)
    for begin in range(start, stop, size):
        end = min(begin + size, stop)
        first, last = (
            structure.first_key(before + begin),
            structure.last_key(before + end - 1, keys),
        )
        seen = Keys.of(structure, first, max(last, first + 1))
        found.append(_Block(slice(begin, end), seen))
    return found


def by_bands(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scoring: Scoring, memo: Memo | None,
    cut: Bands,
) -> Tensor:  # fmt: skip
    """Attend block by block; the result lies in memory as (B, T, H, E)."""
    masks = remembered(memo, q, k, hidden, lambda: _end_masks(q, k, hidden, cut.ends))
    made: list[Tensor] = []
    if cut.blocks:
        made = remembered(memo, q, k, hidden, lambda: _middle_masks(q, hidden, cut), "middle")
    return _attended(q, k, v, masks, made, scoring, cut)


def worth_reading(q: Tensor, k: Tensor) -> bool:
    """Tell whether a mask of all pairs of a call is worth being read."""
    return q.device.type == "cpu" and q.shape[2] * k.shape[2] >= _LEAST_PAIRS


def by_mask(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scoring: Scoring, memo: Memo | None
) -> Tensor | None:
    """Attend block by block, each with the keys that a mask shows it; None where that skips little.

    What is read off the mask serves all layers that have it.
    """
    rows = remembered(memo, q, k, hidden, lambda: _by_extents(q, k, hidden), "rows")
    if rows is None:
        return None
    found = [
        _attended(q[some], k[some], v[some], masks, [], scoring, cut) for some, cut, masks in rows
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _by_extents(
    q: Tensor, k: Tensor, hidden: Hidden
) -> list[tuple[slice, Bands, list[Tensor | None]]] | None:
    """Cut the queries of each row of the batch that has a mask of its own."""
    shown = shown_pairs(hidden, q.shape[2], k.shape[2]) if worth_reading(q, k) else None
    if shown is None:
        return None
    every = shown.dim() < 4 or shown.shape[0] == 1
    rows = [slice(None)] if every else [slice(n, n + 1) for n in range(len(shown))]
    sizes = (hidden.structure, q.shape[2], k.shape[2])
    cuts = [_in_blocks(_shown(shown if every else shown[some], *sizes)) for some in rows]
    if sum(c.scores for c in cuts) > (1 - _LEAST_SKIPPED) * sizes[1] * sizes[2] * len(cuts):
        return None
    masks = [
        _end_masks(q, k, hidden if every else hidden.rows(some), cut.ends)
        for some, cut in zip(rows, cuts, strict=True)
    ]
    return list(zip(rows, cuts, masks, strict=True))


def _shown(shown: Tensor, structure: Structure, queries: int, keys: int) -> list[_Block]:
    """Cut queries into blocks, each with the keys from the first that it sees to the last."""
    before = keys - queries
    found: list[_Block] = []
    for number, (first, last) in enumerate(extents(shown, _CUT)):
        begin, end = number * _CUT, min((number + 1) * _CUT, queries)
        if structure.first is None:
            first = max(first, structure.first_key(before + begin))
        last = min(last, structure.last_key(before + end - 1, keys))
        # Queries that see nothing still attend to a key, which is hidden from them.
        first = min(first, keys - 1)
        found.append(_Block(slice(begin, end), Keys(0, first, max(last, first + 1))))
    return found


def _attended(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor | None], made: list[Tensor],
    scoring: Scoring, cut: Bands,
) -> Tensor:  # fmt: skip
    """Attend block by block, with masks for the blocks at the ends and for those in the middle."""
    given = (q, k, v, scoring.sinks)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    pieces = _pieces(q, k, v, masks, made, scoring, cut, cut.blocks if learning else _AT_ONCE)
    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    found = _joined(pieces) if learning else _written(pieces, q.new_empty(shape))
    return found.transpose(1, 2)


_Piece = tuple[int | None, int, Tensor]


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor | None], made: list[Tensor],
    scoring: Scoring, cut: Bands, at_once: int,
) -> Iterator[_Piece]:  # fmt: skip
    """Yield results, (rows, n, H, E), each with its row, None for all, and its first query."""
    for block, mask in zip(cut.ends, masks, strict=True):
        keys, values = (block.keys.of_tensor(x, 2) for x in (k, v))
        found = kernel(q[:, :, block.queries], keys, values, mask, scoring, block.causal)
        yield None, block.queries.start, found.transpose(1, 2)
    first = cut.first
    for row in range(q.shape[0] if cut.blocks else 0):
        queries = q[row].narrow(1, cut.middle, cut.blocks * cut.size)
        queries = queries.unfold(1, cut.size, cut.size).permute(1, 0, 3, 2)
        keys, values = (_overlapping(x[row], cut, first) for x in (k, v))
        for start in range(0, cut.blocks, at_once):
            some = slice(start, start + at_once)
            mask = made[row % len(made)]
            hides = mask[some] if mask.dim() == 4 else mask
            found = kernel(queries[some], keys[some], values[some], hides, scoring)
            yield row, cut.middle + start * cut.size, found.transpose(1, 2).flatten(0, 1)[None]


def _written(pieces: Iterable[_Piece], result: Tensor) -> Tensor:
    """Copy each piece where it belongs while it is still in the cache."""
    for row, start, piece in pieces:
        rows = result if row is None else result[row : row + 1]
        rows[:, start : start + piece.shape[1]] = piece
    return result


def _joined(pieces: Iterable[_Piece]) -> Tensor:
    """Join the pieces by one copy, which autograd follows at little cost."""
    rows: dict[int, list[Tensor]] = {}
    for _, start, piece in pieces:
        rows.setdefault(start, []).append(piece)
    return torch.cat([torch.cat(rows[start]) for start in sorted(rows)], dim=1)


def _overlapping(x: Tensor, cut: Bands, first: int) -> Tensor:
    """Return the keys of each block, (blocks, H, width, D), after the first ones of all."""
    length = (cut.blocks - 1) * cut.size + cut.width
    seen = x.narrow(1, cut.start, length).unfold(1, cut.width, cut.size).permute(1, 0, 3, 2)
    if not first:
        return seen
    shared = x[:, :first].unsqueeze(0).expand(cut.blocks, -1, -1, -1)
    return torch.cat([shared, seen], dim=2)


def _middle_masks(q: Tensor, hidden: Hidden, cut: Bands) -> list[Tensor]:
    """Return what hides keys in the equal blocks: one for all rows, or one a row with padding."""
    first = hidden.structure.first or 0
    within = replace(hidden.structure, first=None)
    position = cut.width - cut.size - (within.right or 0)
    seen = within.mask(cut.width - position, cut.width, q.device)
    assert seen is not None
    band = F.pad(seen[: cut.size], (first, 0), value=True)
    if hidden.padding is None:
        return [joined(q, Hidden(within, None, band, None), None)]  # type: ignore[list-item]
    masks: list[Tensor] = []
    for row in hidden.padding:
        real = _overlapping(row.transpose(-1, -2), cut, first).transpose(-1, -2)
        masks.append(joined(q, Hidden(within, real, band, None), None))  # type: ignore[arg-type]
    return masks


def _end_masks(
    q: Tensor, k: Tensor, hidden: Hidden, blocks: tuple[_Block, ...]
) -> list[Tensor | None]:
    before = k.shape[2] - q.shape[2]
    made: dict[Hashable, Tensor | None] = {}
    masks: list[Tensor | None] = []
    for block in blocks:
        if block.causal:
            masks.append(None)
            continue
        first = before + block.queries.start
        key: Hashable = (first, block.count, block.keys)
        if hidden.structure.is_relative or block.keys.first:
            key = (first - block.keys.start, block.count, block.keys.first, block.keys.count)
        if key not in made:
            made[key] = _placed(hidden.structure, first, block, q)
        seen = made[key]
        masks.append(joined(q, hidden.part(block.queries, block.keys), seen))
    return masks


def _placed(structure: Structure, position: int, block: _Block, q: Tensor) -> Tensor | None:
    """Return the structure of a block, whose first query is at `position` of all keys."""
    keys = block.keys
    if keys.first:
        structure = replace(structure, first=None)
    row = torch.arange(position, position + block.count, device=q.device).unsqueeze(1)
    seen = structure.at(row, torch.arange(keys.start, keys.stop, device=q.device))
    return None if seen is None else F.pad(seen, (keys.first, 0), value=True)
