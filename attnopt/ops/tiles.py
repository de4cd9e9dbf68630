"""Tokens of a grid in the order of tiles: tile after tile, each row by row.

The tokens before the grid stay where they are. Tiles at the far ends of the axes may be cut off.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def tile_order(
    grid: Sequence[int], tile: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Return the number, row by row, of the token at each place of the order of tiles."""
    numbers = torch.arange(math.prod(grid), device=device)
    key, inside = torch.zeros_like(numbers), torch.zeros_like(numbers)
    for axis, (length, side) in enumerate(zip(grid, tile, strict=True)):
        place = numbers // math.prod(grid[axis + 1 :]) % length
        key = key * -(-length // side) + place // side
        inside = inside * side + place % side
    return torch.argsort(key * math.prod(tile) + inside)


def tile_tokens_reference(
    x: Tensor,
    axis: int,
    grid: Sequence[int],
    tile: Sequence[int],
    leading: int = 0,
    *,
    inverse: bool = False,
) -> Tensor:
    """Bring the tokens along an axis to the order of tiles, or with `inverse` back to rows."""
    _check(x, axis, grid, tile, leading)
    if all(length % side == 0 for length, side in zip(grid, tile, strict=True)):
        first, rest = x.narrow(axis, 0, leading), x.narrow(axis, leading, math.prod(grid))
        moved = _by_axes(rest, axis % x.dim(), grid, tile, inverse=inverse)
        return torch.cat([first, moved], axis) if leading else moved
    order = tile_order(grid, tile, x.device)
    order = torch.argsort(order) if inverse else order
    before = torch.arange(leading, device=x.device)
    return x.index_select(axis, torch.cat([before, order + leading]))


def _by_axes(
    x: Tensor, axis: int, grid: Sequence[int], tile: Sequence[int], *, inverse: bool
) -> Tensor:
    """Permute tokens by axes of their own, where the tiles are whole."""
    rank = len(grid)
    counts = [length // side for length, side in zip(grid, tile, strict=True)]
    rows = [size for pair in zip(counts, tile, strict=True) for size in pair]
    tiles = [*counts, *tile]
    to_tiles = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    to_rows = [i + j for i in range(rank) for j in (0, rank)]
    sizes, order = (tiles, to_rows) if inverse else (rows, to_tiles)
    split = x.unflatten(axis, sizes)
    inner = [axis + i for i in order]
    after = range(axis + 2 * rank, split.dim())
    moved: Tensor = split.permute(*range(axis), *inner, *after)
    return moved.flatten(axis, axis + 2 * rank - 1)


def _check(x: Tensor, axis: int, grid: Sequence[int], tile: Sequence[int], leading: int) -> None:
    if len(tile) != len(grid) or min(tile) < 1:
        raise ValueError(f"tile {list(tile)} must have a positive side for each of {list(grid)}")
    if x.shape[axis] != leading + math.prod(grid):
        raise ValueError(
            f"axis {axis} has {x.shape[axis]} tokens; a grid {list(grid)} after {leading} tokens "
            f"has {leading + math.prod(grid)}"
        )


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "tile_tokens(Tensor x, int axis, int[] grid, int[] tile, int leading=0, *, "
    "bool inverse=False) -> Tensor"
)
_LIBRARY.impl("tile_tokens", tile_tokens_reference, "CompositeImplicitAutograd")

tile_tokens = torch.ops.attnopt.tile_tokens.default
