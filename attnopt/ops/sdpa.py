"""The canonical attention by way of scaled_dot_product_attention: the fast copy of the reference.

Masks are chosen by the sizes of a call. One query needs no structure, only the keys that it sees;
as many queries as keys need the kernel's own causal mode; the rest gets a narrow mask, made once
per forward, for each block of queries and the keys that the block can see. What the kernel cannot
say (a soft cap, sinks) runs by the reference.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.attention import attention_reference
from attnopt.ops.options import Options
from attnopt.ops.structure import chunk_of, visible_keys

# A block has at least this many queries, and blocks pay where they skip this share of the scores.
_BLOCK = 128
_LEAST_SKIPPED = 0.3
_REMEMBERED = 8


@dataclass(frozen=True)
class Structure:
    """What positions hide, as the options of the canonical op say it."""

    causal: bool = False
    window: int | None = None
    right: int | None = None
    prefix: int | None = None
    chunk: int | None = None
    first: int | None = None

    @property
    def is_plain(self) -> bool:
        """Tell whether this is nothing, or causal and nothing else."""
        return self == Structure(causal=self.causal)

    @property
    def ends(self) -> bool:
        """Tell whether no query sees a key after its own."""
        return self.causal or (self.window is not None and self.right is None)

    def needed(self, queries: int, keys: int) -> "Structure":
        """Leave out what hides nothing at these sizes."""
        if self.prefix is not None and self.prefix >= keys:
            return Structure()
        found = self if self.chunk is None or self.chunk < keys else replace(self, chunk=None)
        if found.window is None:
            return found
        reach = keys if found.right is None else keys - 1
        if found.window >= reach and (found.right is None or found.right >= keys - 1):
            return replace(found, causal=found.ends, window=None, right=None, first=None)
        return found

    def first_key(self, position: int) -> int:
        """Return where the window of a query at this position begins."""
        first = 0
        if self.window is not None:
            first = position - self.window + (1 if self.right is None else 0)
        if self.chunk is not None:
            first = max(first, position - position % self.chunk)
        return max(first, 0)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Return the structure as booleans, true = visible."""
        return visible_keys(
            queries, keys, causal=self.causal, window=self.window, right=self.right,
            prefix=self.prefix, chunk=self.chunk, first=self.first, device=device,
        )  # fmt: skip

    def range(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where the window of each query begins, and the key after its last one."""
        row = torch.arange(queries, device=device) + (keys - queries)
        start, stop = torch.zeros_like(row), torch.full_like(row, keys)
        if self.ends:
            stop = row + 1 if self.prefix is None else (row + 1).clamp(min=self.prefix)
        if self.window is not None:
            start = row - self.window + (1 if self.right is None else 0)
        if self.right is not None:
            stop = torch.minimum(stop, row + self.right + 1)
        if self.chunk is not None:
            begin = chunk_of(row, self.chunk) * self.chunk
            start, stop = torch.maximum(start, begin), torch.minimum(stop, begin + self.chunk)
        return start.clamp(0, keys), stop.clamp(0, keys)


@dataclass(frozen=True)
class Hidden:
    """All that says which keys a query sees and with what bias."""

    structure: Structure
    padding: Tensor | None
    mask: Tensor | None
    bias: Tensor | None

    @property
    def is_structure(self) -> bool:
        """Tell whether positions alone decide."""
        return self.padding is None and self.mask is None and self.bias is None

    def part(self, queries: slice, keys: "Keys") -> "Hidden":
        """Return the same for some queries and keys; the structure stays that of the whole."""
        cut = [_part(x, queries, keys) for x in (self.padding, self.mask, self.bias)]
        return Hidden(self.structure, *cut)


@dataclass(frozen=True)
class Keys:
    """Some of the keys: the first so many, and those of a stretch behind them."""

    first: int
    start: int
    stop: int

    @classmethod
    def of(cls, structure: Structure, start: int, stop: int) -> "Keys":
        """Return the keys of a stretch with those that every query sees."""
        first = structure.first or 0
        return cls(0, 0, stop) if start <= first else cls(first, start, stop)

    @property
    def count(self) -> int:
        """How many they are."""
        return self.first + self.stop - self.start

    def of_tensor(self, x: Tensor, axis: int) -> Tensor:
        """Take them from a tensor."""
        stretch = x.narrow(axis, self.start, self.stop - self.start)
        return (
            stretch if not self.first else torch.cat([x.narrow(axis, 0, self.first), stretch], axis)
        )


Memo = dict[Hashable, tuple[Any, Any]]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what `attention_reference` returns first; `memo` keeps masks for later layers.

    Without a memo, as in a graph to be compiled, no loop depends on the sizes.
    """
    given = Options.read(options)
    if given.sinks is not None or given.softcap is not None:
        return attention_reference(q, k, v, **options)[0]
    k, v = _in_groups(q, *given.heads_of(k, v))
    structure = Structure(**given.structure).needed(q.shape[2], k.shape[2])
    hidden = Hidden(structure, given.padding, given.mask, given.bias)
    found = _attend(q, k, v, hidden, given.scale, memo)
    return _mean_of_blind(found, q, k, v, hidden, memo) if given.mean_if_blind else found


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None
) -> Tensor:
    """Choose how a call's masks are said to the kernel; a blind query gives zeros."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        seen = Keys.of(hidden.structure, hidden.structure.first_key(keys - 1), keys)
        if seen.count < keys:
            k, v = seen.of_tensor(k, 2), seen.of_tensor(v, 2)
            hidden = hidden.part(slice(None), seen)
        return _one_query(q, k, v, hidden, scale, memo)
    if hidden.is_structure and hidden.structure.is_plain:
        if not hidden.structure.causal:
            return _kernel(q, k, v, None, scale)
        if queries == keys:
            return _kernel(q, k, v, None, scale, True)
    if memo is None or torch.compiler.is_compiling():
        return _kernel(q, k, v, _mask(q, queries, keys, hidden), scale)
    blocks = _blocks(queries, keys, hidden.structure)
    if blocks:
        return _by_blocks(q, k, v, hidden, scale, memo, blocks)
    made = _remembered(memo, q, k, hidden, lambda: _mask(q, queries, keys, hidden))
    return _kernel(q, k, v, made, scale)


def _mean_of_blind(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, memo: Memo | None
) -> Tensor:
    """Put the mean of the values where a query sees no key."""
    if hidden.padding is None and hidden.mask is None and q.shape[2] <= k.shape[2]:
        # Each query sees its own key at least.
        return found
    sees = _remembered(memo, q, k, hidden, lambda: _sees(q, k, hidden, memo), "sees")
    if sees is None:
        return found
    mean = _repeated(v.mean(dim=2, keepdim=True), q.shape[1])
    return torch.where(sees, found, mean)


def _sees(q: Tensor, k: Tensor, hidden: Hidden, memo: Memo | None) -> Tensor | None:
    """Return which queries see a key, as (B, 1, T, 1) or so; None where each is known to."""
    queries, keys = q.shape[2], k.shape[2]
    structure, padding = hidden.structure, hidden.padding
    if hidden.mask is not None:
        seen = structure.mask(queries, keys, q.device)
        for more in (padding, hidden.mask):
            if more is not None:
                seen = more if seen is None else seen & more
        assert seen is not None
        sees = seen.any(dim=-1, keepdim=True)
    else:
        start, stop = structure.range(queries, keys, q.device)
        if padding is None:
            sees = (stop > start).unsqueeze(-1)
        else:
            before = F.pad(padding.long().cumsum(-1), (1, 0))
            seen = before[..., stop] - before[..., start]
            if structure.first is not None:
                seen = seen + before[..., stop.clamp(max=structure.first)]
            sees = (seen > 0).transpose(-1, -2)
    known = memo is not None and not torch.compiler.is_compiling()
    return None if known and bool(sees.all()) else sees


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give keys and values equally many heads, in groups that the kernel knows."""
    if k.shape[1] == v.shape[1]:
        return k, v
    most = max(k.shape[1], v.shape[1])
    if most % min(k.shape[1], v.shape[1]):
        most = q.shape[1]
    return _repeated(k, most), _repeated(v, most)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False
) -> Tensor:
    """Call the kernel; widths of keys and values that differ are made equal with zeros."""
    width, out = q.shape[-1], v.shape[-1]
    if out < width:
        v = F.pad(v, (0, width - out))
    elif out > width:
        scale = width**-0.5 if scale is None else scale
        q, k = F.pad(q, (0, out - width)), F.pad(k, (0, out - width))
    # A compiler may not know the numbers of heads as numbers; the kernel wants to be told.
    groups = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **groups
    )
    return found[..., :out] if out < width else found


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None
) -> Tensor:
    """Attend with one query, which sees every key that is left."""
    free = replace(hidden, structure=Structure())
    if free.is_structure:
        return _kernel(q, k, v, None, scale)
    made = _remembered(memo, q, k, free, lambda: _mask(q, 1, k.shape[2], free))
    return _kernel(q, k, v, made, scale)


def _mask(q: Tensor, queries: int, keys: int, hidden: Hidden) -> Tensor | None:
    """Return all that is hidden as one additive mask."""
    return _joined(q, hidden, hidden.structure.mask(queries, keys, q.device))


def _joined(q: Tensor, hidden: Hidden, seen: Tensor | None) -> Tensor | None:
    for more in (hidden.padding, hidden.mask):
        if more is not None:
            seen = more if seen is None else seen & more
    bias = None if hidden.bias is None else hidden.bias.to(q.dtype)
    if seen is None:
        return bias
    if bias is not None:
        return bias.masked_fill(~seen, -torch.inf)
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)


def _part(x: Tensor | None, queries: slice, keys: Keys) -> Tensor | None:
    """Cut a tensor that broadcasts to (B, H, T, S)."""
    if x is None:
        return None
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., queries, :]
    return x if x.dim() < 1 or x.shape[-1] == 1 else keys.of_tensor(x, -1)


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that any of them sees."""

    queries: slice
    keys: Keys


def _blocks(queries: int, keys: int, structure: Structure) -> list[_Block]:
    """Cut the queries into blocks where that skips enough keys; nothing where it does not."""
    plain = structure.prefix is None and structure.chunk is None
    if not plain or not (structure.ends or structure.right is not None):
        return []
    size = max(_BLOCK, (structure.window or 0) // 2)
    before = keys - queries
    found: list[_Block] = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        last = before + stop + (0 if structure.right is None else structure.right)
        first = structure.first_key(before + start)
        found.append(_Block(slice(start, stop), Keys.of(structure, first, min(last, keys))))
    done = sum((b.queries.stop - b.queries.start) * b.keys.count for b in found)
    return found if done <= (1 - _LEAST_SKIPPED) * queries * keys else []


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None,
    blocks: list[_Block],
) -> Tensor:  # fmt: skip
    """Attend block by block; the result lies in memory as (B, T, H, E)."""
    masks = _remembered(memo, q, k, hidden, lambda: _block_masks(q, k, hidden, blocks))
    found = [
        _kernel(
            q[:, :, b.queries], b.keys.of_tensor(k, 2), b.keys.of_tensor(v, 2), mask, scale
        ).transpose(1, 2)
        for b, mask in zip(blocks, masks, strict=True)
    ]
    return torch.cat(found, dim=1).transpose(1, 2)


def _block_masks(q: Tensor, k: Tensor, hidden: Hidden, blocks: list[_Block]) -> list[Tensor | None]:
    before = k.shape[2] - q.shape[2]
    made: dict[Hashable, Tensor | None] = {}
    masks: list[Tensor | None] = []
    for block in blocks:
        size = block.queries.stop - block.queries.start
        offset = before + block.queries.start - block.keys.start
        key = (offset, size, block.keys.first, block.keys.count)
        if key not in made:
            made[key] = _placed(hidden.structure, before + block.queries.start, size, block, q)
        seen = made[key]
        masks.append(_joined(q, hidden.part(block.queries, block.keys), seen))
    return masks


def _placed(
    structure: Structure, position: int, queries: int, block: _Block, q: Tensor
) -> Tensor | None:
    """Return the structure of a block, whose first query is at `position` of all keys."""
    keys = block.keys
    if keys.first:
        structure = replace(structure, first=None)
    position, count = position - keys.start, keys.stop - keys.start
    whole = max(count, position + queries)
    seen = structure.mask(whole - position, whole, q.device)
    return None if seen is None else F.pad(seen[:queries, :count], (keys.first, 0), value=True)


def _remembered(
    memo: Memo | None, q: Tensor, k: Tensor, hidden: Hidden, make: Any, what: str = "mask"
) -> Any:
    """Return a mask made before from the same tensors at the same sizes, or make it.

    The tensors are kept with it, so that none of their numbers can be another tensor's.
    """
    if memo is None or torch.compiler.is_compiling():
        return make()
    parts = (hidden.padding, hidden.mask, hidden.bias)
    key = (what, q.shape[2], k.shape[2], q.dtype, hidden.structure, *map(id, parts))
    if key not in memo:
        while len(memo) >= _REMEMBERED:
            memo.pop(next(iter(memo)))
        memo[key] = (make(), parts)
    return memo[key][0]
