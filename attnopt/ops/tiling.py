"""A call cut into tiles: which of them a query may see, and the means of queries and keys.

T queries sit at the end of S keys where a query has a position of its own. Axis letters: B batch, H
query heads, P key heads, G query heads of one key head, I tiles of queries, J tiles of keys. Sizes
may be symbolic: nothing here asks what they are.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.blocks import tiles_in


@dataclass(frozen=True)
class Tiling:
    """Sizes of a call and of its tiles, and `padding` (B, 1, 1, S), true = visible.

    Without `aligned` queries have no position among the keys, as in cross-attention.
    """

    queries: int
    keys: int
    q_tile: int
    k_tile: int
    causal: bool
    aligned: bool
    device: torch.device
    padding: Tensor | None = None

    def finer(self, length: int) -> "Tiling":
        """Return the same call in tiles of `length` queries and keys."""
        return replace(self, q_tile=length, k_tile=length)

    @property
    def rows(self) -> int:
        """How many tiles of queries there are."""
        return tiles_in(self.queries, self.q_tile)

    @property
    def columns(self) -> int:
        """How many tiles of keys there are."""
        return tiles_in(self.keys, self.k_tile)

    def first_positions(self) -> Tensor:
        """Return where the queries of each tile begin, (I, 1)."""
        row = torch.arange(self.rows, device=self.device).unsqueeze(1) * self.q_tile
        return row + (self.keys - self.queries)

    def last_positions(self) -> Tensor:
        """Return the last query of each tile, (I, 1)."""
        return (self.first_positions() + (self.q_tile - 1)).clamp(max=self.keys - 1)

    def first_keys(self) -> Tensor:
        """Return where each tile of keys begins, (J,)."""
        return torch.arange(self.columns, device=self.device) * self.k_tile

    def allowed(self) -> Tensor:
        """Return which tiles hold a key that one of their queries may see, (B or 1, 1, I, J)."""
        shown = self.key_counts().unsqueeze(2) > 0
        if not self.causal:
            return shown.expand(-1, -1, self.rows, -1)
        return shown & (self.first_keys() <= self.last_positions())

    def whole(self) -> Tensor:
        """Return the tiles whose keys all of their queries see as far as positions say, (I, J)."""
        last = (self.first_keys() + (self.k_tile - 1)).clamp(max=self.keys - 1)
        if not self.causal:
            return (last >= 0).expand(self.rows, -1)
        return last <= self.first_positions()

    def diagonal(self) -> Tensor:
        """Return the tiles that hold the keys of their own queries, (I, J)."""
        first = self.first_keys()
        after = first + self.k_tile > self.first_positions()
        return after & (first <= self.last_positions())

    def first_shown(self) -> Tensor:
        """Return the tile that the first visible key is in, (B or 1, 1, 1, J)."""
        shown = self.key_counts().unsqueeze(2) > 0
        return shown & (shown.long().cumsum(-1) == 1)

    def key_counts(self) -> Tensor:
        """Return the visible keys of each tile, (B or 1, 1, J)."""
        return _counts(self.keys, self.k_tile, self.padding, self.device)

    def query_counts(self) -> Tensor:
        """Return the queries of each tile that stand for a token, (B or 1, 1, I)."""
        return _counts(self.queries, self.q_tile, self.query_padding, self.device)

    @property
    def query_padding(self) -> Tensor | None:
        """The padding at the places of the queries."""
        if self.padding is None or not self.aligned:
            return None
        return self.padding[..., self.keys - self.queries :]

    def key_means(self, k: Tensor) -> Tensor:
        """Return the mean of the visible keys of each tile, (B, P, J, D) in float32."""
        return _means(k, self.k_tile, self.padding, self.key_counts())

    def query_means(self, q: Tensor) -> Tensor:
        """Return the mean of the queries of each tile, (B, H, I, D) in float32."""
        return _means(q, self.q_tile, self.query_padding, self.query_counts())


def is_known(size: Any) -> bool:
    """Tell a size that is a number from one that a traced graph will learn."""
    return isinstance(size, int)


def tiles_of(x: Tensor, tile: int, padding: Tensor | None = None) -> Tensor:
    """Cut (B, H, L, D) into (B, H, tiles, tile, D) in float32, with zeros where nothing is."""
    if padding is not None:
        x = x.masked_fill(~padding.transpose(-1, -2), 0.0)
    more = tiles_in(x.shape[2], tile) * tile - x.shape[2]
    if not is_known(more) or more:
        x = F.pad(x, (0, 0, 0, more))
    found: Tensor = x.float().unflatten(2, (-1, tile))
    return found


def _means(x: Tensor, tile: int, padding: Tensor | None, counts: Tensor) -> Tensor:
    if tile == 1:
        return tiles_of(x, 1, padding).squeeze(3)
    return tiles_of(x, tile, padding).sum(3) / counts.clamp(min=1).unsqueeze(-1)


def _counts(length: int, tile: int, padding: Tensor | None, device: torch.device) -> Tensor:
    count = tiles_in(length, tile)
    there = (torch.arange(count * tile, device=device) < length)[None, None]
    if padding is not None:
        there = there & F.pad(padding[:, :, 0], (0, count * tile - length), value=False)
    counts: Tensor = there.unflatten(-1, (-1, tile)).sum(-1).float()
    return counts
