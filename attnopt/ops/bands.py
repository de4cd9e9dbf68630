"""Attention within a window, by blocks of queries and the keys that each of them can see.

In the middle of a text all blocks see as many keys, so that one call of the kernel does them all:
the keys are a view in which blocks overlap, and nothing is copied. What is left at either end is
done block by block.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.hidden import Hidden, Keys, Memo, Structure, joined, kernel, remembered

# Blocks have an eighth of a window's queries, within these bounds.
_LEAST, _MOST = 64, 256
_CUT = 128
# What is skipped of the scores must be worth it.
_LEAST_SKIPPED = 0.3


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that any of them sees."""

    queries: slice
    keys: Keys

    @property
    def count(self) -> int:
        """How many queries they are."""
        size: int = self.queries.stop - self.queries.start
        return size


@dataclass(frozen=True)
class Bands:
    """Queries cut into equal blocks in the middle, and blocks of their own at the ends.

    The middle begins at a query and has so many blocks of `size`; each sees `width` keys, the first
    of them `start`.
    """

    ends: tuple[_Block, ...]
    middle: int
    blocks: int
    size: int
    start: int
    width: int

    @property
    def scores(self) -> int:
        """How many scores are computed for one head."""
        return self.blocks * self.size * self.width + sum(b.count * b.keys.count for b in self.ends)


def bands(queries: int, keys: int, hidden: Hidden) -> Bands | None:
    """Cut the queries where that skips enough keys; None where it does not.

    Masks and biases that are not of positions alone differ from block to block.
    """
    structure = hidden.structure
    plain = structure.prefix is None and structure.chunk is None
    if not plain or not (structure.ends or structure.right is not None):
        return None
    if structure.window is None or hidden.mask is not None or hidden.bias is not None:
        found = Bands(tuple(_cut(0, queries, keys - queries, keys, structure)), 0, 0, 0, 0, 0)
    else:
        found = _bands(queries, keys, structure, structure.window)
    return found if found.scores <= (1 - _LEAST_SKIPPED) * queries * keys else None


def _bands(queries: int, keys: int, structure: Structure, window: int) -> Bands:
    before = keys - queries
    size = min(max(_LEAST, window // 8), _MOST)
    back = window - (1 if structure.right is None else 0)
    ahead = structure.right or 0
    # A block belongs to the middle where its window is cut off at neither end.
    head = -(-max(back + (structure.first or 0) - before, 0) // size)
    tail = max((queries - ahead) // size, head)
    first, last = min(head * size, queries), min(tail * size, queries)
    ends = (
        *_cut(0, first, before, keys, structure),
        *_cut(last, queries, before, keys, structure),
    )
    start = before + first - back
    return Bands(ends, first, (last - first) // size, size, start, back + size + ahead)


def _cut(start: int, stop: int, before: int, keys: int, structure: Structure) -> list[_Block]:
    """Cut a stretch of queries into blocks, each with the keys that it sees."""
    found: list[_Block] = []
    size = max(_CUT, (structure.window or 0) // 2)
    for begin in range(start, stop, size):
        end = min(begin + size, stop)
        last = before + end + (structure.right or 0)
        seen = Keys.of(structure, structure.first_key(before + begin), min(last, keys))
        found.append(_Block(slice(begin, end), seen))
    return found


def by_bands(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None,
    cut: Bands,
) -> Tensor:  # fmt: skip
    """Attend block by block; the result lies in memory as (B, T, H, E)."""
    masks = remembered(memo, q, k, hidden, lambda: _end_masks(q, k, hidden, cut.ends))
    found = {
        b.queries.start: kernel(
            q[:, :, b.queries], b.keys.of_tensor(k, 2), b.keys.of_tensor(v, 2), mask, scale
        ).transpose(1, 2)
        for b, mask in zip(cut.ends, masks, strict=True)
    }
    if cut.blocks:
        made = remembered(memo, q, k, hidden, lambda: _middle_masks(q, hidden, cut), "middle")
        rows = [
            _middle(q[b], k[b], v[b], made[b % len(made)], scale, cut, hidden.structure.first or 0)
            for b in range(q.shape[0])
        ]
        found[cut.middle] = torch.cat(rows)
    return torch.cat([found[start] for start in sorted(found)], dim=1).transpose(1, 2)


def _middle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, cut: Bands, first: int
) -> Tensor:
    """Attend with all equal blocks of one row, (H, T, D), at once; return (1, T, H, E)."""
    count = cut.blocks * cut.size
    queries = q.narrow(1, cut.middle, count).unfold(1, cut.size, cut.size).permute(1, 0, 3, 2)
    keys, values = (_overlapping(x, cut, first) for x in (k, v))
    found = kernel(queries, keys, values, mask, scale)
    return found.transpose(1, 2).reshape(1, count, q.shape[0], v.shape[-1])


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
        offset = before + block.queries.start - block.keys.start
        key = (offset, block.count, block.keys.first, block.keys.count)
        if key not in made:
            made[key] = _placed(hidden.structure, before + block.queries.start, block, q)
        seen = made[key]
        masks.append(joined(q, hidden.part(block.queries, block.keys), seen))
    return masks


def _placed(structure: Structure, position: int, block: _Block, q: Tensor) -> Tensor | None:
    """Return the structure of a block, whose first query is at `position` of all keys."""
    keys = block.keys
    if keys.first:
        structure = replace(structure, first=None)
    position, count = position - keys.start, keys.stop - keys.start
    whole = max(count, position + block.count)
    seen = structure.mask(whole - position, whole, q.device)
    return None if seen is None else F.pad(seen[: block.count, :count], (keys.first, 0), value=True)
