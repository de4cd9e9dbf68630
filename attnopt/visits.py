"""How many tiles of keys a kernel visits on a grid, and which stride and tile let it visit few.

A kernel that works tile by tile is bounded in its speed-up by the tiles that it visits, and slowed
by those that it must mask; both follow from the window, so that they are searched without a GPU.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.neighborhoods import Axis, Border, Neighborhood


@dataclass(frozen=True)
class Visits:
    """What a kernel does that works tile by tile, in shares of a dense one.

    `flop_bound` and `tile_bound` bound its speed-up by pairs and by tiles, `dense` is the share of
    the visited tiles that need no mask.
    """

    flop_bound: float
    tile_bound: float
    dense: float

    @property
    def predicted(self) -> float:
        """The speed-up over dense: a fit to two published kernels on an H100."""
        return self.tile_bound * (0.55 + 0.45 * self.dense)


def simulate(hood: Neighborhood, tile_q: Sequence[int], tile_k: Sequence[int]) -> Visits:
    """Count the tiles of keys that the tiles of queries visit; leading tokens are not counted.

    Tiles lie within the classes of a dilation.
    """
    lines = [_visits(*row) for row in zip(hood.axes, tile_q, tile_k, strict=True)]
    visited = math.prod(sum(v for v, _ in line) / len(line) for line in lines)
    dense = math.prod(sum(d for _, d in line) / len(line) for line in lines)
    tiles = math.prod(_tiles(*row) for row in zip(hood.axes, tile_k, strict=True))
    pairs = math.prod(axis.length / axis.mean_window for axis in hood.axes)
    return Visits(pairs, tiles / visited, dense / visited)


def _tiles(axis: Axis, tile: int) -> int:
    """Count the tiles of an axis."""
    return sum(-(-axis.class_length(r) // tile) for r in range(min(axis.dilation, axis.length)))


def _visits(axis: Axis, tile_q: int, tile_k: int) -> list[tuple[int, int]]:
    """Return, for every tile of queries of an axis, the tiles of keys visited, and seen whole."""
    found: list[tuple[int, int]] = []
    for residue in range(min(axis.dilation, axis.length)):
        length = axis.class_length(residue)
        spans = [axis.span(i, length) for i in range(length)]
        for first in range(0, length, tile_q):
            own = spans[first : first + tile_q]
            tiles = range(min(a for a, _ in own) // tile_k, -(-max(b for _, b in own) // tile_k))
            start, stop = max(a for a, _ in own), min(b for _, b in own)
            whole = [
                t for t in tiles if t * tile_k >= start and min((t + 1) * tile_k, length) <= stop
            ]
            found.append((len(tiles), len(whole)))
    return found


def tile_shapes(grid: Sequence[int], area: int) -> list[tuple[int, ...]]:
    """Return every tile of `area` tokens with sides that are powers of two and fit the grid."""
    sides = [[2**e for e in range(area.bit_length()) if 2**e <= n] for n in grid]
    return [t for t in itertools.product(*sides) if math.prod(t) == area]


@dataclass(frozen=True)
class Found:
    """A stride and a tile that the search found, with what is predicted of them."""

    stride: tuple[int, ...]
    tile: tuple[int, ...]
    visits: Visits


def search(
    grid: Sequence[int], window: Sequence[int], *, area: int = 128, border: Border = "shift"
) -> list[Found]:
    """Rank strides and tiles by the predicted speed-up, the best first."""
    found: list[Found] = []
    for tile in tile_shapes(grid, area):
        choices = [sorted({1, t, 2 * t, n}) for t, n in zip(tile, window, strict=True)]
        for stride in itertools.product(*choices):
            if any(s > w for s, w in zip(stride, window, strict=True)):
                continue
            axes = zip(grid, window, stride, strict=True)
            hood = Neighborhood(tuple(Axis(*row, border=border) for row in axes))
            found.append(Found(stride, tile, simulate(hood, tile, tile)))
    return sorted(found, key=lambda f: (-f.visits.predicted, f.stride, f.tile))
