"""How a processor cuts a grid into tiles of queries, each with the box of keys that they see.

Tiles of which the queries see the same of boxes of one size make a batch, which is one call.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.neighborhoods import Axis, Neighborhood, Piece

# What moving a key and its value, a tile, and a batch of tiles cost, in scores of one head; and
# which share of a dense attention tiles may cost to be worth it. Measured with channels of 64.
_MOVED, _PER_TILE, _PER_BATCH, _WORTH = 20, 300, 3000, 0.9


@dataclass(frozen=True)
class Batch:
    """Tiles with boxes of one size of which their queries see the same: for each axis its pieces.

    A tile is one piece of each axis.
    """

    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return math.prod(len(pieces) for pieces in self.pieces)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and how many keys of the grid each of its tiles has."""
        first = [pieces[0] for pieces in self.pieces]
        return math.prod(len(p.queries) for p in first), math.prod(len(p.keys) for p in first)

    def cost(self, leading: int) -> int:
        """Return what it takes, in scores of one head."""
        queries, keys = self.sizes
        per_tile = queries * (keys + leading) + _MOVED * (keys + leading) + _PER_TILE
        return self.count * per_tile + _PER_BATCH


@dataclass(frozen=True)
class Tiling:
    """How the queries of a grid are cut into tiles, and why so; no batches: all at once."""

    batches: tuple[Batch, ...]
    tile: tuple[int, ...]
    cost: float
    why: str


def tiling(hood: Neighborhood) -> Tiling:
    """Choose the tiles that cost a processor least, or none where they do not pay."""
    dense = hood.tokens**2
    if hood.is_dense:
        return Tiling((), hood.grid, 1.0, "every token sees every token")
    lines = [[(t, _by_spans(axis, t)) for t in _sides(axis)] for axis in hood.axes]
    choices = [tuple(zip(*chosen, strict=True)) for chosen in itertools.product(*lines)]
    costs = [_cost(parts, hood.leading) for _, parts in choices]
    least = min(costs)
    tile, parts = choices[costs.index(least)]
    share = (least + hood.leading * hood.tokens) / dense
    sides = " x ".join(map(str, tile))
    if share > _WORTH:
        why = f"the best tiles ({sides}) cost {share:.0%} of a dense attention"
        return Tiling((), tile, share, why)
    batches = tuple(Batch(pieces) for pieces in itertools.product(*parts))
    return Tiling(batches, tile, share, f"tiles of {sides} cost {share:.0%} of a dense attention")


def _sides(axis: Axis) -> list[int]:
    """Return the sides of tiles that are tried along an axis."""
    longest = axis.class_length(0)
    return [*(2**e for e in range(longest.bit_length()) if 2**e < longest), longest]


def _by_spans(axis: Axis, tile: int) -> tuple[tuple[Piece, ...], ...]:
    """Group the pieces of an axis whose queries see the same of boxes of one size."""
    found: dict[tuple[int, tuple[tuple[int, int], ...]], list[Piece]] = {}
    for piece in axis.pieces(tile):
        found.setdefault((len(piece.keys), piece.spans), []).append(piece)
    return tuple(tuple(pieces) for pieces in found.values())


def _cost(parts: Sequence[tuple[tuple[Piece, ...], ...]], leading: int) -> int:
    return sum(Batch(pieces).cost(leading) for pieces in itertools.product(*parts))
