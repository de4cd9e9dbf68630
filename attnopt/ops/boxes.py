"""Neighbourhood attention tile by tile, each over its box of keys: the fast copy of the reference.

Axis letters as in `attnopt.ops.attention`; n tiles of Tq queries attend to Tk keys each.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.neighborhoods import Neighborhood, Piece
from attnopt.ops.neighborhood import check, visible_tokens
from attnopt.ops.options import Options
from attnopt.ops.sdpa import Memo, attend
from attnopt.ops.tiles import tile_order
from attnopt.tilings import Batch, tiling

# Elements of the keys that are moved at once: larger ones leave the cache, and are paid in pages.
_MOST = 2**19


class _Batch(NamedTuple):
    """Tiles that one call attends to: the places of their queries (n, Tq) and keys (n, Tk).

    `seen` says which keys a query sees (Tq, Tk); None where it is all of them. there are n `tiles`.
    """

    tiles: int
    queries: Tensor
    keys: Tensor
    seen: Tensor | None


class _Made(NamedTuple):
    """What the layers of a forward share: all tiles, and each token's place among their results.

    Without tiles, `seen` says which tokens see which (T, T); None where all see all.
    """

    batches: tuple[_Batch, ...]
    results: Tensor | None
    seen: Tensor | None


def attend_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    border: str = "shift",
    leading: int = 0,
    tile: Sequence[int] = (),
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what the reference returns first: tile by tile where `tiling` says that it pays.

    A tile of queries attends to the box of keys that any of them sees.
    """
    check(q, k, grid, leading)
    given = Options.read(options)
    hides = given.mask is not None or given.padding is not None
    axes = (tuple(grid), tuple(window), tuple(stride), tuple(dilation), tuple(causal))
    # Compiled graphs would hold every batch of tiles of every layer: they take a mask.
    whole = torch.compiler.is_compiling() or (given.mean_if_blind and hides)
    settings = (*axes, border, leading, tuple(tile), whole, q.device)
    made = _remembered(memo, ("neighborhood", *settings), settings)
    if not made.batches:
        mask = given.mask if made.seen is None else made.seen
        if made.seen is not None and given.mask is not None:
            mask = made.seen & given.mask
        return attend(q, k, v, memo, **{**options, "mask": mask})
    k, v = given.heads_of(k, v)
    plain = {"sinks": given.sinks, "scale": given.scale, "softcap": given.softcap}
    batches = [part for batch in made.batches for part in _parts(batch, k)]
    parts = [_attend_batch(q, k, v, batch, given, plain) for batch in batches]
    if leading:
        first = _rows_of(given, slice(leading))
        parts.insert(0, attend(q[:, :, :leading], k, v, None, **first, **plain).transpose(1, 2))
    assert made.results is not None
    return torch.cat(parts, dim=1).index_select(1, made.results).transpose(1, 2)


def _remembered(memo: Memo | None, key: tuple[Any, ...], settings: tuple[Any, ...]) -> _Made:
    """Return what an earlier layer made, or make it."""
    if memo is None or torch.compiler.is_compiling():
        return _constant(*settings)
    if key not in memo:
        memo[key] = (_made(*settings), ())
    made: _Made = memo[key][0]
    return made


def _made(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    border: str,
    leading: int,
    tile: tuple[int, ...],
    whole: bool,
    device: torch.device,
) -> _Made:
    """Choose the tiles, and say in tensors which tokens they hold, by their places."""
    hood = Neighborhood.of(grid, window, stride, dilation, causal, border, leading)
    batches = () if whole else _tiling(hood).batches
    if not batches:
        seen = None if hood.is_dense else visible_tokens(hood, tile, device)
        return _Made((), None, seen)
    places = torch.arange(hood.tokens - leading, device=device)
    if tile:
        places = torch.argsort(tile_order(grid, tile, device))
    before = torch.arange(leading, device=device)
    made = tuple(_batch(b, hood, places + leading, before) for b in batches)
    listed = torch.cat([before, *(b.queries.flatten() for b in made)])
    return _Made(made, torch.argsort(listed), None)


_tiling = lru_cache(maxsize=64)(tiling)
# A compiler takes the tensors as they are; it does not trace how they are made.
_constant: Callable[..., _Made] = torch.compiler.assume_constant_result(_made)


def _batch(batch: Batch, hood: Neighborhood, places: Tensor, before: Tensor) -> _Batch:
    queries = places[_numbers([[p.queries for p in ps] for ps in batch.pieces], hood, places)]
    keys = places[_numbers([[p.keys for p in ps] for ps in batch.pieces], hood, places)]
    keys = torch.cat([before.expand(len(keys), -1), keys], dim=1)
    if all(pieces[0].is_dense for pieces in batch.pieces):
        return _Batch(batch.count, queries, keys, None)
    seen = torch.ones(1, 1, dtype=torch.bool, device=places.device)
    for pieces in batch.pieces:
        along = _inside(pieces[0], places.device)
        both = seen[:, None, :, None] & along[None, :, None, :]
        seen = both.reshape(seen.shape[0] * along.shape[0], seen.shape[1] * along.shape[1])
    seen = torch.nn.functional.pad(seen, (len(before), 0), value=True)
    return _Batch(batch.count, queries, keys, seen)


def _inside(piece: Piece, device: torch.device) -> Tensor:
    """Return which keys of its box each query of a piece sees."""
    key = torch.arange(len(piece.keys), device=device)
    start, stop = torch.tensor(piece.spans, device=device).T.unsqueeze(-1)
    seen: Tensor = (key >= start) & (key < stop)
    return seen


def _numbers(boxes: list[list[range]], hood: Neighborhood, like: Tensor) -> Tensor:
    """Return the tokens of boxes by their numbers row by row, (boxes, tokens of each)."""
    found = torch.zeros(1, 1, dtype=torch.long, device=like.device)
    for axis, ranges in zip(hood.axes, boxes, strict=True):
        along = torch.tensor([list(r) for r in ranges], device=like.device)
        both = found[:, None, :, None] * axis.length + along[None, :, None, :]
        found = both.reshape(found.shape[0] * along.shape[0], found.shape[1] * along.shape[1])
    return found


def _parts(batch: _Batch, k: Tensor) -> Iterator[_Batch]:
    """Cut a batch so that the keys of a call stay small."""
    step = max(1, _MOST // (batch.keys.shape[1] * k.shape[0] * k.shape[1] * k.shape[3]))
    for first in range(0, batch.tiles, step):
        queries, keys = (x[first : first + step] for x in (batch.queries, batch.keys))
        yield _Batch(len(queries), queries, keys, batch.seen)


def _attend_batch(
    q: Tensor, k: Tensor, v: Tensor, batch: _Batch, given: Options, plain: dict[str, Any]
) -> Tensor:
    """Attend with the queries of some tiles; the result is (B, tokens, H, E), tile after tile."""
    of_queries = _moved(q, batch.queries, batch.tiles)
    of_keys, of_values = (_moved(x, batch.keys, batch.tiles) for x in (k, v))
    bias = _added(q, batch, given)
    found = attend(of_queries, of_keys, of_values, None, bias=bias, **plain).transpose(1, 2)
    return found.reshape(q.shape[0], -1, *found.shape[2:])


def _moved(x: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the tokens at some places (n, N) of (B, H, T, D) as (B n, H, N, D)."""
    rows = x.transpose(1, 2).index_select(1, places.flatten())
    return rows.reshape(x.shape[0] * count, -1, *rows.shape[2:]).transpose(1, 2)


def _added(q: Tensor, batch: _Batch, given: Options) -> Tensor | None:
    """Return all that is added to the scores of some tiles, (B n, H, Tq, Tk) or what spreads."""
    found: Tensor | None = None
    if given.bias is not None:
        found = _of_tiles(given.bias.to(q.dtype), q, batch)
    hidden = [_of_tiles(x, q, batch) for x in (given.mask, given.padding) if x is not None]
    for seen in (*hidden, *(() if batch.seen is None else (batch.seen,))):
        if found is None:
            found = torch.zeros((), dtype=q.dtype, device=q.device)
        found = torch.where(seen, found, -torch.inf)
    return found


def _of_tiles(x: Tensor, q: Tensor, batch: _Batch) -> Tensor:
    """Cut a tensor that broadcasts to (B, H, T, S) for some tiles, (B n, H, Tq, Tk)."""
    tokens = q.shape[2]
    whole = x.expand(*([1] * (4 - x.dim())), *x.shape[:-2], tokens, tokens)
    cut = whole[:, :, batch.queries[:, :, None], batch.keys[:, None, :]].transpose(1, 2)
    cut = cut.expand(q.shape[0], *cut.shape[1:])
    return cut.reshape(q.shape[0] * cut.shape[1], *cut.shape[2:])


def _rows_of(given: Options, queries: slice) -> dict[str, Tensor]:
    """Return bias, mask and padding of some queries."""
    found = {"bias": given.bias, "mask": given.mask, "padding": given.padding}
    return {
        name: x if x.dim() < 2 or x.shape[-2] == 1 else x[..., queries, :]
        for name, x in found.items()
        if x is not None
    }
