"""Plans of tiles made from what is known of a mask, without the mask.

Each tile of queries meets each tile of keys in one of three ways: no query sees a key (not
listed), some do (partial: visited through the mask), all see all (full: no mask is needed). The
bounds of the tiles decide, one comparison a rule, so that a plan costs a few small tensor ops. A
tile may be called partial without need, never full. Axis letters as in `attnopt.ops.blocks`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.blocks import TILE, grid_of
from attnopt.ops.structure import chunk_of


@dataclass(frozen=True)
class BlockPlan:
    """Which tiles of keys each tile of queries visits: counts (B or 1, P, I), indices (..., J)."""

    count: Tensor
    index: Tensor
    full_count: Tensor | None = None
    full_index: Tensor | None = None
    q_tile: int = TILE
    k_tile: int = TILE

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the tensors in the order in which the op takes them."""
        return self.count, self.index, self.full_count, self.full_index

    def visited(self) -> Tensor:
        """Count the tiles that are visited, for every plan of the batch."""
        count = self.count if self.full_count is None else self.count + self.full_count
        return count.sum(-1)


def plan_of_structure(
    queries: int,
    keys: int,
    q_tile: int = TILE,
    k_tile: int = TILE,
    *,
    whole: bool = True,
    device: torch.device | str | None = None,
    **structure: Any,
) -> BlockPlan:
    """Return the plan (1, 1, I, J) of a structure, given by the options of an op.

    `whole` lists full tiles apart; without it every tile is visited through the masks, as a call
    with a mask of its own needs.
    """
    bounds = _Bounds.of(queries, keys, q_tile, k_tile, device)
    some, every = bounds.meet(**structure)
    width = _widest(keys, q_tile, k_tile, **structure)
    return _plan(some, every if whole else torch.zeros_like(every), q_tile, k_tile, width)


def plan_of_windows(
    start: Tensor,
    stop: Tensor,
    place: Tensor,
    q_tile: int = TILE,
    k_tile: int = TILE,
    **structure: Any,
) -> BlockPlan:
    """Return the plan (1, 1, I, J) of windows over coordinates, within a structure.

    A query sees a key whose `place` (S, axes) lies from `start` up to `stop` (T, axes) on every
    axis; a key of negative place is in every window.
    """
    bounds = _Bounds.of(len(start), len(place), q_tile, k_tile, start.device)
    allowed, free = bounds.meet(**structure)
    lowest, highest = _by_tile(start, q_tile)
    first, last = _by_tile(stop, q_tile)
    extra = (place < 0).any(-1)
    most = torch.iinfo(place.dtype).max
    least_place = _by_tile(place.masked_fill(extra.unsqueeze(-1), most), k_tile)[0]
    last_place = _by_tile(place.masked_fill(extra.unsqueeze(-1), -1), k_tile)[1]
    has_extra = _by_tile(extra.int().unsqueeze(-1), k_tile)[1].squeeze(-1).bool()
    meets = (lowest.unsqueeze(1) <= last_place) & (least_place < last.unsqueeze(1))
    holds = (highest.unsqueeze(1) <= least_place) & (last_place < first.unsqueeze(1))
    some = (meets.all(-1) | has_extra) & allowed
    return _plan(some, holds.all(-1) & some & free, q_tile, k_tile, some.shape[-1])


def plan_of_mask(mask: Tensor, q_tile: int = TILE, k_tile: int = TILE) -> BlockPlan:
    """Return the plan (B or 1, P, I, J) of a mask (B or 1, P, T, S), true = visible."""
    queries, keys = mask.shape[-2:]
    rest = (0, -keys % k_tile, 0, -queries % q_tile)
    grid = (F.pad(mask, rest, value=fill) for fill in (False, True))
    rows, columns = -(-queries // q_tile), -(-keys // k_tile)
    some, every = (x.unflatten(-1, (columns, k_tile)).unflatten(-3, (rows, q_tile)) for x in grid)
    found, whole = some.any(-1).any(-2), every.all(-1).all(-2)
    return _plan(found, whole, q_tile, k_tile, columns)


def transposed(plan: BlockPlan, keys: int) -> BlockPlan:
    """Return which tiles of queries visit each tile of keys: the same, read by the other axis."""
    tiles = -(-keys // plan.k_tile)
    grid = grid_of(plan.count, plan.index, tiles).transpose(-1, -2)
    count, index = _listed(grid, grid.shape[-1])
    if plan.full_count is None or plan.full_index is None:
        return BlockPlan(count, index, None, None, plan.k_tile, plan.q_tile)
    grid = grid_of(plan.full_count, plan.full_index, tiles).transpose(-1, -2)
    full = _listed(grid, grid.shape[-1])
    return BlockPlan(count, index, *full, plan.k_tile, plan.q_tile)


@dataclass(frozen=True)
class _Bounds:
    """The first and last position of each tile: queries (I, 1), keys (J,)."""

    q_first: Tensor
    q_last: Tensor
    k_first: Tensor
    k_last: Tensor

    @classmethod
    def of(
        cls, queries: int, keys: int, q_tile: int, k_tile: int, device: torch.device | str | None
    ) -> "_Bounds":
        """Return the bounds of all tiles; queries sit at the end of the keys."""
        row = torch.arange(0, queries, q_tile, device=device).unsqueeze(1)
        column = torch.arange(0, keys, k_tile, device=device)
        past = keys - queries
        return cls(
            row + past,
            (row + q_tile).clamp(max=queries) - 1 + past,
            column,
            (column + k_tile).clamp(max=keys) - 1,
        )

    def meet(
        self,
        *,
        causal: bool = False,
        window: int | None = None,
        right: int | None = None,
        prefix: int | None = None,
        chunk: int | None = None,
        first: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return where some query may see a key, and where surely all see all: (I, J)."""
        some = torch.ones(len(self.q_first), len(self.k_first), dtype=torch.bool)
        some = some.to(self.q_first.device)
        every = some
        if causal or (window is not None and right is None):
            rule = (self.k_first <= self.q_last, self.k_last <= self.q_first)
            more = (False, False) if prefix is None else self._before(prefix)
            some, every = some & (rule[0] | more[0]), every & (rule[1] | more[1])
        if window is not None:
            reach = window if right is None else window + 1
            rule = (self.q_first - self.k_last < reach, self.q_last - self.k_first < reach)
            more = (False, False) if first is None else self._before(first)
            some, every = some & (rule[0] | more[0]), every & (rule[1] | more[1])
        if right is not None:
            some = some & (self.k_first - self.q_last <= right)
            every = every & (self.k_last - self.q_first <= right)
        if chunk is not None:
            q_from, q_to, k_from, k_to = (
                chunk_of(x, chunk) for x in (self.q_first, self.q_last, self.k_first, self.k_last)
            )
            some = some & (q_from <= k_to) & (k_from <= q_to)
            every = every & (q_from == k_to) & (k_from == q_to)
        return some, every

    def _before(self, position: int) -> tuple[Tensor, Tensor]:
        """Return which tiles hold a key before a position, and which hold no other."""
        return self.k_first < position, self.k_last < position


def _widest(
    keys: int,
    q_tile: int,
    k_tile: int,
    *,
    causal: bool = False,
    window: int | None = None,
    right: int | None = None,
    prefix: int | None = None,
    chunk: int | None = None,
    first: int | None = None,
) -> int:
    """Return how many tiles of keys a tile of queries visits at most."""
    tiles = -(-keys // k_tile)
    reach = keys
    if window is not None and prefix is None:
        reach = window + (0 if right is None else right + 1) + q_tile
    if chunk is not None and prefix is None:
        reach = min(reach, 2 * chunk + q_tile)
    return max(1, min(tiles, reach // k_tile + 2 + -(-(first or 0) // k_tile)))


def _by_tile(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest number of each axis in every tile of tokens."""
    rest = -len(x) % tile
    padded = torch.cat([x, x[-1:].expand(rest, -1)]) if rest else x
    tiles = padded.unflatten(0, (-1, tile))
    return tiles.amin(dim=1), tiles.amax(dim=1)


def _plan(some: Tensor, every: Tensor, q_tile: int, k_tile: int, width: int) -> BlockPlan:
    """List the tiles of two grids that are (I, J), or have axes before these."""
    some, every = (x.reshape(*(1,) * (4 - x.dim()), *x.shape) for x in (some, every))
    return BlockPlan(*_listed(some & ~every, width), *_listed(every, width), q_tile, k_tile)


def _listed(grid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the count and the index, of so many places, of the tiles that a grid marks."""
    order = grid.cumsum(-1) - 1
    places = torch.where(grid, order, width)
    tiles = torch.arange(grid.shape[-1], dtype=torch.int32, device=grid.device).expand(grid.shape)
    index = torch.zeros(*grid.shape[:-1], width + 1, dtype=torch.int32, device=grid.device)
    index = index.scatter(-1, places, tiles)[..., :width].contiguous()
    return grid.sum(-1, dtype=torch.int32), index
