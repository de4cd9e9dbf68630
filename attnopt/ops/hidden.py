"""What hides keys from queries, as the fast copies take it: positions, padding, masks, biases."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.ops.structure import chunk_of, visible_at, visible_keys

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

    def last_key(self, position: int, keys: int) -> int:
        """Return the key after the last one that a query at this position sees, of so many."""
        last = keys
        if self.ends:
            last = max(position + 1, self.prefix or 0)
        if self.right is not None:
            last = min(last, position + self.right + 1)
        if self.chunk is not None:
            last = min(last, position - position % self.chunk + self.chunk)
        return min(last, keys)

    @property
    def is_relative(self) -> bool:
        """Tell whether positions matter only by how far a key is from a query."""
        return self.prefix is None and self.chunk is None and self.first is None

    def at(self, row: Tensor, column: Tensor) -> Tensor | None:
        """Return whether queries at the positions `row` see keys at those of `column`."""
        return visible_at(
            row, column, causal=self.causal, window=self.window, right=self.right,
            prefix=self.prefix, chunk=self.chunk, first=self.first,
        )  # fmt: skip

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
        cut = [part_of(x, queries, keys) for x in (self.padding, self.mask, self.bias)]
        return Hidden(self.structure, *cut)

    def rows(self, some: slice) -> "Hidden":
        """Return the same for some rows of the batch."""
        cut = [
            x if x is None or x.dim() < 4 or x.shape[0] == 1 else x[some]
            for x in (self.padding, self.mask, self.bias)
        ]
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


def whole_mask(q: Tensor, queries: int, keys: int, hidden: Hidden) -> Tensor | None:
    """Return all that is hidden as one additive mask."""
    return joined(q, hidden, hidden.structure.mask(queries, keys, q.device))


def joined(q: Tensor, hidden: Hidden, seen: Tensor | None) -> Tensor | None:
    """Return what is seen, padding, masks and biases as one additive mask; None for nothing."""
    for more in (hidden.padding, hidden.mask):
        if more is not None:
            seen = more if seen is None else seen & more
    bias = None if hidden.bias is None else hidden.bias.to(q.dtype)
    if seen is None:
        return bias
    if bias is not None:
        return bias.masked_fill(~seen, -torch.inf)
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)


def part_of(x: Tensor | None, queries: slice, keys: Keys) -> Tensor | None:
    """Cut a tensor that broadcasts to (B, H, T, S)."""
    if x is None:
        return None
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., queries, :]
    return x if x.dim() < 1 or x.shape[-1] == 1 else keys.of_tensor(x, -1)


def remembered(
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
