"""Attention by a plan of tiles: which tiles of keys each tile of queries visits, for every head.

A plan is said as FlexAttention says it. For each tile of queries, `count` tiles of keys are visited
through the masks, those listed first in `index`, and `full_count` tiles of `full_index` are seen
whole, but for padding. Axis letters: B batch, P plan heads (1, the key heads, or the query heads),
I tiles of queries, J tiles of keys. Tiles count from the first query and the first key of a call;
the last of either may be cut off. A query without a visible key gives zeros. With `least_tokens` a
call of fewer keys, or of fewer queries than a tile has, does not read the plan: it sees all that
the masks leave.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.attention import OPTIONS_SCHEMA, attention_reference
from attnopt.ops.structure import OPTIONS, visible_keys

TILE = 128


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    index: Tensor,
    full_count: Tensor | None = None,
    full_index: Tensor | None = None,
    *,
    q_tile: int = TILE,
    k_tile: int = TILE,
    least_tokens: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, E) and the log-sum-exp (B, H, T) of attention by a plan.

    Counts are (B or 1, P, I), indices (B or 1, P, I, J or fewer), both int32.
    """
    queries, keys, heads = q.shape[2], k.shape[2], q.shape[1]
    structure = {name: options.pop(name) for name in OPTIONS if name in options}
    within = visible_keys(queries, keys, device=q.device, **structure)
    mask = options.pop("mask", None)
    if mask is not None:
        within = mask if within is None else within & mask
    sizes = (queries, keys, q_tile, k_tile, heads)
    seen = visited(count, index, *sizes)
    if least_tokens:
        seen = seen | ~plan_is_read(queries, keys, q_tile, least_tokens, q.device)
    if within is not None:
        seen = seen & within
    if full_count is not None and full_index is not None:
        seen = seen | visited(full_count, full_index, *sizes)
    return attention_reference(q, k, v, mask=seen, **options)


def visited(
    count: Tensor, index: Tensor, queries: int, keys: int, q_tile: int, k_tile: int, heads: int
) -> Tensor:
    """Return which keys the tiles of a plan hold, as booleans (B or 1, H, T, S)."""
    grid = grid_of(count, index, tiles_in(keys, k_tile))
    grid = grid.repeat_interleave(heads // grid.shape[1], dim=1)
    by_query = grid.repeat_interleave(q_tile, dim=2)[:, :, :queries]
    return by_query.repeat_interleave(k_tile, dim=3)[..., :keys]


def tiles_in(length: int, tile: int) -> int:
    """Return how many tiles a length has; no number is negative, which ONNX rounds another way."""
    return (length + tile - 1) // tile


def grid_of(count: Tensor, index: Tensor, tiles: int) -> Tensor:
    """Return which tiles of keys are visited, as booleans (B or 1, P, I, J)."""
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    # One tile more takes what is listed beyond the count.
    places = torch.where(listed, index.long(), tiles)
    grid = torch.zeros(*index.shape[:-1], tiles + 1, dtype=torch.bool, device=index.device)
    return grid.scatter(-1, places, value=True)[..., :tiles]


def listed(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the count and the index of a grid of visited tiles."""
    index = torch.argsort((~grid).to(torch.int32), dim=-1, stable=True)
    return grid.sum(-1, dtype=torch.int32), index.to(torch.int32)


def plan_is_read(
    queries: int, keys: int, q_tile: int, least_tokens: int, device: torch.device
) -> Tensor:
    """Say as a tensor what `reads_plan` says, for sizes that a traced graph does not know."""
    enough_queries = torch.full((), queries, device=device) >= q_tile
    return enough_queries & (torch.full((), keys, device=device) >= least_tokens)


def reads_plan(queries: int, keys: int, q_tile: int, least_tokens: int) -> bool:
    """Tell whether a call of these sizes reads its plan."""
    return not least_tokens or (queries >= q_tile and keys >= least_tokens)


def _forward(*args: Any, **options: Any) -> Tensor:
    return block_attention_reference(*args, **options)[0]


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_TAKES = (
    "(Tensor q, Tensor k, Tensor v, Tensor count, Tensor index, Tensor? full_count=None, "
    f"Tensor? full_index=None, *, int q_tile={TILE}, int k_tile={TILE}, int least_tokens=0, "
    f"{OPTIONS_SCHEMA})"
)
_LIBRARY.define(f"block_attention{_TAKES} -> Tensor")
_LIBRARY.define(f"block_attention_lse{_TAKES} -> (Tensor, Tensor)")
_LIBRARY.impl("block_attention", _forward, "CompositeImplicitAutograd")
_LIBRARY.impl("block_attention_lse", block_attention_reference, "CompositeImplicitAutograd")

block_attention = torch.ops.attnopt.block_attention.default
block_attention_lse = torch.ops.attnopt.block_attention_lse.default
