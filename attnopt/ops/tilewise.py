"""What each tile of a plan is: not visited, seen whole, or cut, and by what.

Axis letters: B batch, P plan heads, I tiles of queries, J tiles of keys.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.hidden import Structure
from attnopt.ops.options import Options
from attnopt.ops.structure import visible_at

# How a tile is cut, as bits of its code; above them, where it lies if it is cut by position.
BY_POSITION: Final = 1
BY_END: Final = 2
BY_PADDING: Final = 4
BY_ROW: Final = 8
POSITION: Final = 16
_WHOLE, _CUT, _UNSEEN = 0, 1, 2
# Tiles of fewer queries are joined to tiles of about so many.
_LEAST_QUERIES, _JOINED_QUERIES = 32, 128


@dataclass(frozen=True)
class Tilewise:
    """A plan with the sizes, structure and padding of a call.

    `masked` tiles are visited through the masks, `listed` ones are seen whole, both (B or 1, P, I,
    J). Where tiles of queries were joined, `rows` (B or 1, P, I, q_tile, J) says which of their
    queries visit a tile.
    """

    queries: int
    keys: int
    q_tile: int
    k_tile: int
    masked: Tensor
    listed: Tensor
    structure: Structure
    padding: Tensor | None
    rows: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, masked: Tensor, listed: Tensor, q_tile: int, k_tile: int,
        given: Options,
    ) -> "Tilewise":  # fmt: skip
        """Read a call."""
        queries, keys = q.shape[2], k.shape[2]
        structure = Structure(**given.structure).needed(queries, keys)
        padding = given.padding if given.padding is not None and not given.padding.all() else None
        return cls(queries, keys, q_tile, k_tile, masked, listed, structure, padding)

    @property
    def is_relative(self) -> bool:
        """Tell whether positions matter only by how far a key is from a query."""
        own = self.structure
        return own.prefix is None and own.chunk is None and own.first is None

    @property
    def shifts(self) -> dict[str, Any]:
        """The structure, where it is relative, as options."""
        own = self.structure
        return {"causal": own.causal, "window": own.window, "right": own.right}

    @cached_property
    def is_complete(self) -> bool:
        """Tell whether the plan visits all that the masks leave, and nothing else."""
        if not bool(self.listed.any()) and bool(self.masked.all()):
            return True
        if not self.is_relative or self.shows_more:
            return False
        return bool((self.visited | (self.states == _UNSEEN) | ~self._shown[0]).all())

    @cached_property
    def shows_more(self) -> bool:
        """Tell whether the plan shows whole tiles that positions cut."""
        return bool((self.listed & (self.states != _WHOLE)).any())

    @cached_property
    def visited(self) -> Tensor:
        """The tiles that are read, (B or 1, P, I, J)."""
        return ((self.masked & (self.states != _UNSEEN)) | self.listed) & self._shown[0]

    @property
    def density(self) -> float:
        """Return the share of what dense attention visits."""
        dense = ((self.states != _UNSEEN) & self._shown[0]).expand_as(self.visited)
        return float(self.visited.sum()) / max(float(dense.sum()), 1.0)

    @cached_property
    def codes(self) -> Tensor:
        """What each tile is, (B or 1, P, I, J): -1 not visited, 0 whole, else how it is cut."""
        by_position = self.masked & ~self.listed & (self.states == _CUT)
        codes = torch.where(by_position, BY_POSITION + POSITION * self._places, 0)
        if self.keys % self.k_tile:
            codes[..., -1] += BY_END
        codes = codes + BY_PADDING * (~self._shown[1]).long()
        if self.rows is not None:
            codes = codes + BY_ROW * (~self.rows.all(3)).long()
        return codes.masked_fill(~self.visited, -1)

    def distance(self, place: int) -> int:
        """Return how far the first query of a tile is behind its first key."""
        return place - self.keys - self.queries

    def joined(self) -> "Tilewise":
        """Join tiles of few queries: a kernel is slow on a few rows."""
        if self.q_tile >= _LEAST_QUERIES or self.queries <= self.q_tile:
            return self
        count = _JOINED_QUERIES // self.q_tile
        grid = self.masked | self.listed
        each = F.pad(grid, (0, 0, 0, -grid.shape[2] % count)).unflatten(2, (-1, count))
        found = each.any(3)
        return replace(
            self, q_tile=self.q_tile * count, masked=found, listed=torch.zeros_like(found),
            rows=each.repeat_interleave(self.q_tile, dim=3),
        )  # fmt: skip

    @cached_property
    def _places(self) -> Tensor:
        """Return the place of each tile (I, J) as a number that `distance` reads, not negative."""
        first_row, _, first_column, _ = self._ends
        return first_row - first_column + self.keys + self.queries

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the first and last positions of queries (I, 1), and those of keys (J,)."""
        device = self.masked.device
        row = torch.arange(self.masked.shape[2], device=device).unsqueeze(1) * self.q_tile
        column = torch.arange(self.masked.shape[3], device=device) * self.k_tile
        before = self.keys - self.queries
        last_row = (row + self.q_tile).clamp(max=self.queries) - 1
        last_column = (column + self.k_tile).clamp(max=self.keys) - 1
        return row + before, last_row + before, column, last_column

    @cached_property
    def states(self) -> Tensor:
        """What positions leave of each tile, (I, J): whole, cut or unseen."""
        own = self.structure
        first_row, last_row, first, last = self._ends
        if not self.is_relative:
            return torch.full_like(first_row - first, _CUT)
        whole = torch.ones_like(first_row - first, dtype=torch.bool)
        for corner in (
            visible_at(first_row, last, **self.shifts),
            visible_at(last_row, first, **self.shifts),
        ):
            whole = whole if corner is None else whole & corner
        unseen = torch.zeros_like(whole)
        if own.ends:
            unseen = unseen | (first > last_row)
        if own.window is not None:
            reach = own.window if own.right is None else own.window + 1
            unseen = unseen | (first_row - last >= reach)
        if own.right is not None:
            unseen = unseen | (first - last_row > own.right)
        return torch.where(unseen, _UNSEEN, torch.where(whole, _WHOLE, _CUT))

    @cached_property
    def _shown(self) -> tuple[Tensor, Tensor]:
        """Return of which tiles the padding shows a key, and all keys, (B or 1, 1, 1, J)."""
        if self.padding is None:
            shown = torch.ones(1, 1, 1, self.masked.shape[3], dtype=torch.bool)
            shown = shown.to(self.masked.device)
            return shown, shown
        more = -self.keys % self.k_tile
        some, every = (
            F.pad(self.padding, (0, more), value=value).unflatten(-1, (-1, self.k_tile))
            for value in (False, True)
        )
        return some.any(-1), every.all(-1)
