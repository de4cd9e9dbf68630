"""Attention by a plan of tiles on kernels for dense attention: the fast copy of the reference.

Rows (a tile of queries of one plan head) that visit equally many tiles make one call: what they
visit is gathered, tiles seen whole first, those that positions cut last. The cut is the same for
all rows of a call, so that one narrow mask serves them, and rows of whole tiles need none. Query
heads of a group share what is gathered. Calls that visit everything, are small, or have masks of
their own for all pairs are made dense.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.ops.blocks import TILE, block_attention_reference, grid_of, reads_plan, visited
from attnopt.ops.gathering import by_rows
from attnopt.ops.options import Options
from attnopt.ops.sdpa import Memo, attend
from attnopt.ops.structure import visible_keys
from attnopt.ops.tilewise import Tilewise

# Below so many pairs of a query and a key, one masked call is faster than several narrow ones.
_SMALL = 2**16


@dataclass(frozen=True)
class Way:
    """How a plan is carried out, and why."""

    name: Literal["dense", "masked", "gathered"]
    why: str


def attend_blocks(
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
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what `block_attention_reference` returns first.

    Without a memo, as in a graph to be compiled, one op hides the loops that depend on the plan.
    """
    plan = (q, k, v, count, index, full_count, full_index)
    if torch.compiler.is_exporting():
        return block_attention_reference(
            *plan, q_tile=q_tile, k_tile=k_tile, least_tokens=least_tokens, **options
        )[0]
    if not reads_plan(q.shape[2], k.shape[2], q_tile, least_tokens):
        return attend(q, k, v, memo=memo, **options)
    if memo is None or torch.compiler.is_compiling():
        from attnopt.ops.opaque import call

        return call(*plan, q_tile=q_tile, k_tile=k_tile, **options)
    return by_plan(*plan, q_tile=q_tile, k_tile=k_tile, memo=memo, **options)


def by_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    index: Tensor,
    full_count: Tensor | None,
    full_index: Tensor | None,
    *,
    q_tile: int,
    k_tile: int,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Attend in the way that suits the plan."""
    given = Options.read(options)
    columns = -(-k.shape[2] // k_tile)
    masked = grid_of(count, index, columns)
    whole = torch.zeros_like(masked)
    if full_count is not None and full_index is not None:
        whole = grid_of(full_count, full_index, columns)
    plan = Tilewise.of(q, k, masked, whole, q_tile, k_tile, given)
    match way(plan, given).name:
        case "dense":
            return attend(q, k, v, memo=memo, **options)
        case "masked":
            return _masked(q, k, v, (count, index, full_count, full_index), plan, given, options)
        case "gathered":
            return by_rows(q, k, v, plan.joined(), given)


def way(plan: Tilewise, given: Options) -> Way:
    """Choose how to carry out a plan."""
    if plan.is_complete and (given.mask is None or not bool(plan.listed.any())):
        return Way("dense", "every tile that the masks leave is visited")
    if given.sinks is not None:
        return Way("masked", "sinks of each head join no gathered call")
    if given.mask is not None or given.bias is not None:
        return Way("masked", "a mask or bias of all pairs is there already")
    if not plan.is_relative:
        return Way("masked", "prefix, chunks and first keys are not said tile by tile")
    if plan.shows_more and plan.joined() is not plan:
        return Way("masked", "tiles of few queries are seen whole where positions cut them")
    if plan.queries * plan.keys <= _SMALL:
        return Way("masked", f"at most {_SMALL:,} pairs a head: one call is faster than several")
    return Way("gathered", f"{plan.density:.0%} of the tiles are visited")


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    plan: Tilewise,
    given: Options,
    options: dict[str, Any],
) -> Tensor:
    """Attend with one mask for all pairs."""
    sizes = (plan.queries, plan.keys, plan.q_tile, plan.k_tile, q.shape[1])
    seen = visited(lists[0], lists[1], *sizes)
    for within in (visible_keys(*sizes[:2], **given.structure, device=q.device), given.mask):
        seen = seen if within is None else seen & within
    if lists[2] is not None and lists[3] is not None:
        seen = seen | visited(lists[2], lists[3], *sizes)
    left = {n: x for n, x in options.items() if n not in (*given.structure, "mask")}
    return attend(q, k, v, mask=seen, **left)
