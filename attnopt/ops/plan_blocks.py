"""Plans made from queries and keys: `attnopt::plan_blocks` estimates, selects, and lists tiles.

Its results are what `attnopt::block_attention` takes: count and index of the tiles that positions
cut, and of those seen whole. Each key head has one plan, for all queries that read it. The first
tile with a visible key and the tiles of the queries' own keys are always visited.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.blocks import TILE, listed, plan_is_read, reads_plan, tiles_in
from attnopt.ops.estimators import ESTIMATORS, Call, group_scores
from attnopt.ops.selecting import select
from attnopt.ops.tiling import Tiling, is_known

STRIDE = 16
# The mean cosine below which sparge takes tokens for unlike: as published, never.
ALIKE = -0.1

Plan = tuple[Tensor, Tensor, Tensor, Tensor]


def plan_tiles(
    q: Tensor,
    k: Tensor,
    *,
    estimator: str,
    rule: str,
    amount: float,
    tile: int = TILE,
    causal: bool = False,
    q_tile: int | None = None,
    aligned: bool = True,
    padding: Tensor | None = None,
    scale: float | None = None,
    k_map: list[int] | None = None,
    stride: int = STRIDE,
    multiple: int = 1,
    alike: float = ALIKE,
    least_tokens: int = 0,
    dense_above: float = 1.0,
) -> Plan:
    """Return a plan for queries (B, H, T, D) and keys (B, Hk, S, D), P plan heads of key heads.

    Without `aligned` queries have no positions, as in cross-attention. `q_tile` is that of keys
    unless given. A call of fewer keys than `least_tokens`, or of fewer queries than a tile, gets a
    plan that visits everything, and so does one whose plan visits more than `dense_above` of it.
    """
    k = k if k_map is None else k[:, list(k_map)]
    q_tile = tile if q_tile is None else q_tile
    queries, keys = q.shape[2], k.shape[2]
    tiling = Tiling(queries, keys, q_tile, tile, causal, aligned, q.device, padding)
    known = is_known(queries) and is_known(keys)
    if known and not reads_plan(queries, keys, q_tile, least_tokens):
        return _everything(q.shape[0], k.shape[1], tiling)
    allowed = tiling.allowed().expand(q.shape[0], k.shape[1], -1, -1)
    if amount >= 1 and rule in ("topk", "mass"):
        return _lists(allowed, tiling)
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    with torch.no_grad():
        scores, wanted = ESTIMATORS[estimator](Call(q, k, factor, tiling, min(stride, tile), alike))
        routed = q_tile != tile
        forced = _forced(tiling, routed=routed)
        forced = forced if wanted is None else forced | wanted
        # What heads of a group like in their own tile depends on keys that are still to come.
        scores = group_scores(scores, allowed & ~forced if routed else allowed)
        grid = select(scores, allowed, forced, rule, amount, multiple)
    if dense_above < 1:
        share = grid.sum() / allowed.sum().clamp(min=1)
        grid = grid | (allowed & (share > dense_above))
    if least_tokens and not known:
        grid = grid | (allowed & ~plan_is_read(queries, keys, q_tile, least_tokens, q.device))
    return _lists(grid, tiling)


def _forced(tiling: Tiling, *, routed: bool) -> Tensor:
    """Return the tiles that every query needs; a routed one needs its own only."""
    first = tiling.first_shown()
    if not tiling.aligned:
        return first
    return tiling.diagonal() if routed else first | tiling.diagonal()


def _everything(batch: int, heads: int, tiling: Tiling) -> Plan:
    """Return a plan of all tiles, which the masks decide."""
    count = torch.full(
        (batch, heads, tiling.rows), tiling.columns, dtype=torch.int32, device=tiling.device
    )
    index = torch.arange(tiling.columns, dtype=torch.int32, device=tiling.device)
    index = index.expand(batch, heads, tiling.rows, -1)
    return count, index, torch.zeros_like(count), index


def _lists(grid: Tensor, tiling: Tiling) -> Plan:
    whole = tiling.whole()
    return (*listed(grid & ~whole), *listed(grid & whole))


def _made(q: Tensor, k: Tensor, **options: Any) -> Plan:
    count, index, full_count, full_index = plan_tiles(q, k, **options)
    return count, index.contiguous(), full_count, full_index.clone()


def _shaped(q: Tensor, k: Tensor, **options: Any) -> Plan:
    tile = options.get("tile") or TILE
    q_tile = options.get("q_tile") or tile
    heads = k.shape[1] if options.get("k_map") is None else len(options["k_map"])
    sizes = (q.shape[0], heads, tiles_in(q.shape[2], q_tile))
    count = q.new_empty(sizes, dtype=torch.int32)
    index = q.new_empty((*sizes, tiles_in(k.shape[2], tile)), dtype=torch.int32)
    return count, index, torch.empty_like(count), torch.empty_like(index)


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "plan_blocks(Tensor q, Tensor k, *, str estimator, str rule, float amount, "
    f"int tile={TILE}, bool causal=False, int? q_tile=None, bool aligned=True, "
    "Tensor? padding=None, float? scale=None, int[]? k_map=None, "
    f"int stride={STRIDE}, int multiple=1, float alike={ALIKE}, int least_tokens=0, "
    "float dense_above=1.0) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("plan_blocks", _made, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::plan_blocks", _shaped, lib=_LIBRARY)

plan_blocks = torch.ops.attnopt.plan_blocks.default
