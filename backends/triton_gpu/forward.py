"""Attention by a plan of tiles: softmax over the keys of the tiles listed, tile after tile.

A program holds M queries of one head and visits the listed tiles of keys, N keys at a time:
m' = max(m, max x), l = l 2^(m - m') + sum 2^(x - m'), o = o 2^(m - m') + 2^(x - m') v, with
scores x in base two; at the end o / l and m + log2 l. Full tiles come first, then partial ones.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.backends.triton_gpu.launching import (
    Launch,
    Sizes,
    cut,
    padded_width,
    rows_for,
    rows_within,
    scales,
)
from attnopt.backends.triton_gpu.masking import Hidden, Rules, hide
from attnopt.backends.triton_gpu.shapes import chip_of, forward_shape
from attnopt.backends.triton_gpu.tiles import (
    LN_2,
    LOG2_E,
    load_rows,
    product,
    scores,
    store_rows,
)
from attnopt.ops.plans import BlockPlan


class Lists(NamedTuple):
    """A plan as kernels read it: a line for each tile of a plan head.

    `batch` is how many lines a batch row has of its own, 0 where all share them; `group` is the
    number of heads that share a plan head.
    """

    count: Any
    index: Any
    width: int
    full_count: Any
    full_index: Any
    full_width: int | None
    rows: int
    batch: int
    group: int

    @classmethod
    def of(cls, plan: BlockPlan, heads: int) -> "Lists":
        """Return the lists of a plan for so many heads."""
        batch, plan_heads, rows = plan.count.shape
        full = plan.full_index
        return cls(
            plan.count.contiguous(),
            plan.index.contiguous(),
            plan.index.shape[-1],
            None if plan.full_count is None else plan.full_count.contiguous(),
            None if full is None else full.contiguous(),
            None if full is None else full.shape[-1],
            rows,
            0 if batch == 1 else plan_heads * rows,
            heads // plan_heads,
        )


@triton.jit
def forward_kernel(
    q, k, v, out, lse, sinks, q_strides, k_strides, v_strides, out_strides, lists, hidden, rules,
    sizes, scale, cap, Q_TILE: tl.constexpr, K_TILE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr,
    V_SPACE: tl.constexpr, AXES: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Attend with M queries of one head."""
    blocks = tl.cdiv(sizes.queries, M)
    # Under causality the last queries take longest: they start first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * M
    h = (tl.program_id(0) // blocks) % sizes.heads
    b = (tl.program_id(0) // blocks // sizes.heads).to(tl.int64)
    q += b * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k += b * k_strides[0] + (h // sizes.k_group).to(tl.int64) * k_strides[1]
    v += b * v_strides[0] + (h // sizes.v_group).to(tl.int64) * v_strides[1]
    query = load_rows(q, first, q_strides, sizes.queries, M, WIDTH, SPACE)
    line = b * lists.batch + (h // lists.group) * lists.rows + first // Q_TILE
    total = tl.full([M], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    found = tl.full([M, V_SPACE], 0.0, tl.float32)
    if lists.full_count is not None:
        found, total, top = _visit(
            found, total, top, query, k, v, k_strides, v_strides,
            lists.full_index + line * lists.full_width, tl.load(lists.full_count + line), hidden,
            rules, b, h, first, sizes, scale, cap, K_TILE, M, N, WIDTH, SPACE, V_WIDTH, V_SPACE,
            AXES, CUT, False,
        )  # fmt: skip
    found, total, top = _visit(
        found, total, top, query, k, v, k_strides, v_strides, lists.index + line * lists.width,
        tl.load(lists.count + line), hidden, rules, b, h, first, sizes, scale, cap, K_TILE, M, N,
        WIDTH, SPACE, V_WIDTH, V_SPACE, AXES, CUT, True,
    )  # fmt: skip
    row = first + tl.arange(0, M)
    place = lse + (b * sizes.heads + h) * sizes.queries + row
    logarithm = tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(place, (top + logarithm) * LN_2, mask=row < sizes.queries)
    if sinks is not None:
        safe = tl.where(top == float("-inf"), 0.0, top)
        total += tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2_E - safe)
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    out += b * out_strides[0] + h.to(tl.int64) * out_strides[1]
    store_rows(out, found, first, out_strides, sizes.queries, M, V_WIDTH, V_SPACE)


@triton.jit
def _visit(
    found, total, top, query, k, v, k_strides, v_strides, index, count, hidden, rules, b, h, first,
    sizes, scale, cap, K_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr,
    AXES: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys of the tiles listed."""
    parts: tl.constexpr = K_TILE // N
    row = (first + tl.arange(0, M))[:, None]
    for step in tl.range(count * parts):
        start = tl.load(index + step // parts) * K_TILE + step % parts * N
        key = load_rows(k, start, k_strides, sizes.keys, N, WIDTH, SPACE)
        x = scores(query, key, scale, cap, M, N)
        column = (start + tl.arange(0, N))[None, :]
        x = hide(
            x, hidden, rules, b, h, row, column, row + sizes.keys - sizes.queries, column,
            sizes.queries, sizes.keys, AXES, MASKED, CUT,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        # A row that has seen nothing yet keeps minus infinity, and subtracts zero.
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v, start, v_strides, sizes.keys, N, V_WIDTH, V_SPACE)
        found = product(weights.to(value.dtype), value, found * shrink[:, None])
        top = new
    return found, total, top


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    hidden: Hidden,
    rules: Rules,
    *,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    chip: int | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return what to run, and the output and the log-sum-exp that it fills."""
    batch, heads, queries, width = q.shape
    out = torch.empty(batch, queries, heads, v.shape[-1], dtype=v.dtype, device=q.device)
    out = out.transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    biased = hidden.bias is not None
    shape = forward_shape(max(width, v.shape[-1]), q.dtype, chip or chip_of(q), biased=biased)
    rows = rows_within(plan.q_tile, rows_for(queries, shape.queries))
    factor, cap = scales(scale, softcap)
    launch = Launch(
        forward_kernel,
        cut(queries, rows) * batch * heads,
        {
            "q": q, "k": k, "v": v, "out": out, "lse": lse, "sinks": sinks,
            "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
            "out_strides": out.stride(), "lists": Lists.of(plan, heads), "hidden": hidden,
            "rules": rules, "scale": factor, "cap": cap, "sizes": sizes_of(q, k, v),
            "Q_TILE": plan.q_tile, "K_TILE": plan.k_tile, "M": rows,
            "N": rows_within(plan.k_tile, shape.keys), **widths(q, v),
            "AXES": 0 if hidden.place is None else hidden.place.shape[-1],
            "CUT": k.shape[2] % plan.k_tile != 0,
        },
        shape.warps,
        shape.stages,
    )  # fmt: skip
    return launch, out, lse


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """Return the sizes of a call."""
    heads = q.shape[1]
    return Sizes(heads, q.shape[2], k.shape[2], heads // k.shape[1], heads // v.shape[1])


def widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Return how wide heads are, and how much space they take."""
    return {
        "WIDTH": q.shape[-1],
        "SPACE": padded_width(q.shape[-1]),
        "V_WIDTH": v.shape[-1],
        "V_SPACE": padded_width(v.shape[-1]),
    }
