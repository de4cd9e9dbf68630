"""Attention of few queries over a long cache: the keys are split, the parts joined by log-sum-exp.

A program holds all queries of the heads that share a key head as its rows, so that keys are read
once for all of them, and visits a stretch of the keys. Parts o_i with log-sum-exp L_i are joined as
sum_i o_i 2^(L_i - L) with L = log2 sum_i 2^L_i; a learned sink joins the denominator there, once.
Of a window with first keys, only those keys are read. Keys may lie in any order: `positions` (S,)
says where each of them stands, and -1 that a place is empty.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.backends.triton_gpu.forward import sizes_of, widths
from attnopt.backends.triton_gpu.launching import Launch, cut, rows_for, scales
from attnopt.backends.triton_gpu.masking import Hidden, Rules, hide
from attnopt.backends.triton_gpu.tiles import LN_2, LOG2_E, product, scores

LEAST_BLOCKS = 4
"""A split visits at least this many blocks of keys."""
MANY_ROWS = 16
"""More rows than this (agents, not tokens) take memory that one stage of loads would need."""


@triton.jit
def decode_kernel(
    q, k, v, positions, part, part_lse, q_strides, k_strides, v_strides, hidden, rules, sizes,
    scale, cap, place, members, head_blocks, tail, count, per, splits, live, M: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr,
    V_SPACE: tl.constexpr,
):  # fmt: skip
    """Attend over one stretch of the keys with the queries of heads that share them."""
    split = tl.program_id(0) % splits
    groups = sizes.heads // members
    head = (tl.program_id(0) // splits) % groups * members
    b = (tl.program_id(0) // splits // groups).to(tl.int64)
    member = tl.arange(0, M) // sizes.queries
    row = tl.arange(0, M) % sizes.queries
    alive = member < members
    h = head + tl.where(alive, member, 0)
    q += b * q_strides[0]
    channel = tl.arange(0, SPACE)
    at = h[:, None] * q_strides[1] + row[:, None] * q_strides[2] + channel[None, :] * q_strides[3]
    query = tl.load(q + at, mask=alive[:, None] & (channel < WIDTH)[None, :], other=0.0)
    k += b * k_strides[0] + (head // sizes.k_group).to(tl.int64) * k_strides[1]
    v += b * v_strides[0] + (head // sizes.v_group).to(tl.int64) * v_strides[1]
    total = tl.full([M], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    found = tl.full([M, V_SPACE], 0.0, tl.float32)
    stop = tl.minimum((split + 1) * per, count)
    if live is not None:
        stop = tl.where(tl.load(live + b * groups + head // members) != 0, stop, 0)
    for step in tl.range(split * per, stop):
        start = tl.where(step < head_blocks, step * N, tail + (step - head_blocks) * N)
        column = start + tl.arange(0, N)
        holds = column < sizes.keys
        stands = column
        if positions is not None:
            stands = tl.load(positions + column, mask=holds, other=-1)
            holds = stands >= 0
        if hidden.padding is not None:
            shown = hidden.padding + b * hidden.padding_strides[0]
            shown += column * hidden.padding_strides[1]
            holds = holds & (tl.load(shown, mask=column < sizes.keys, other=0) != 0)
        key = _load(k, start, k_strides, holds, N, WIDTH, SPACE)
        x = hide(
            scores(query, key, scale, cap, M, N), hidden, rules, b, h[:, None], row[:, None],
            column[None, :], row[:, None] + place, stands[None, :], sizes.queries, sizes.keys, 0,
            True, True,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        value = _load(v, start, v_strides, holds, N, V_WIDTH, V_SPACE)
        found = product(weights.to(value.dtype), value, found * shrink[:, None])
        top = new
    some = tl.where(total > 0, total, 1.0)
    batches = tl.num_programs(0) // splits // groups
    line = ((split * batches + b) * sizes.heads + h) * sizes.queries + row
    tl.store(part_lse + line, top + tl.log2(some), mask=alive)
    channel = tl.arange(0, V_SPACE)
    at = line[:, None] * V_WIDTH + channel[None, :]
    inside = alive[:, None] & (channel < V_WIDTH)[None, :]
    tl.store(part + at, found / some[:, None], mask=inside)


@triton.jit
def _load(
    base, first, strides, holds, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr
):
    """Load the rows that hold something; what the others have in memory is not read."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, SPACE)
    base += first.to(tl.int64) * strides[2]
    inside = holds[:, None]
    if WIDTH != SPACE:
        inside = inside & (channel < WIDTH)[None, :]
    place = row[:, None] * strides[2] + channel[None, :] * strides[3]
    return tl.load(base + place, mask=inside, other=0.0)


@triton.jit
def join_kernel(
    part, part_lse, sinks, out, lse, out_strides, sizes, splits, SPLITS: tl.constexpr,
    V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query."""
    line = tl.program_id(0)
    lines = tl.num_programs(0)
    row = line % sizes.queries
    h = line // sizes.queries % sizes.heads
    b = (line // sizes.queries // sizes.heads).to(tl.int64)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, V_SPACE)
    place = split.to(tl.int64) * lines + line
    each = tl.load(part_lse + place, mask=split < splits, other=float("-inf"))
    top = tl.max(each, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp2(each - safe)
    total = tl.sum(shares, 0)
    some = tl.where(total > 0, total, 1.0)
    tl.store(lse + line, (top + tl.log2(some)) * LN_2)
    if sinks is not None:
        some = total + tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2_E - safe)
    inside = (split < splits)[:, None] & (channel < V_WIDTH)[None, :]
    at = part + place[:, None] * V_WIDTH + channel[None, :]
    found = tl.sum(tl.load(at, mask=inside, other=0.0) * shares[:, None], 0) / some
    out += b * out_strides[0] + h.to(tl.int64) * out_strides[1] + row * out_strides[2]
    place = out + channel * out_strides[3]
    tl.store(place, found.to(out.dtype.element_ty), mask=channel < V_WIDTH)


class Stretch(NamedTuple):
    """The blocks of keys that are read: so many from the first key on, the rest from a later one.

    `blocks` is how many there are in all.
    """

    head_blocks: int
    tail: int
    blocks: int

    @classmethod
    def of(cls, rules: Rules, place: int, queries: int, keys: int, block: int) -> "Stretch":
        """Return what queries at `place` and after it read by the rules."""
        start, stop = 0, keys
        if rules.left is not None:
            start = max(start, place - rules.left)
        if rules.chunk is not None:
            start = max(start, place - place % rules.chunk)
        if rules.ends is not None:
            stop = min(stop, max(place + queries, rules.prefix or 0))
        heads = cut(min(rules.first or 0, stop), block)
        start = min(max(start, heads * block), max(stop, heads * block))
        return cls(heads, start, heads + cut(max(stop - start, 0), block))


def decode_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Hidden,
    rules: Rules,
    *,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    positions: Tensor | None = None,
    place: int | None = None,
    splits: int | None = None,
    live: Tensor | None = None,
) -> tuple[tuple[Launch, Launch], Tensor, Tensor]:
    """Return what to run, and the output and the log-sum-exp that it fills.

    The first query stands at `place`: by default, the queries are the last of the keys. Of `live`,
    (B, groups) bytes, a zero says that nobody reads the keys of a group: its heads see nothing.
    """
    batch, heads, queries, _ = q.shape
    sizes = sizes_of(q, k, v)
    place = sizes.keys - queries if place is None else place
    members = gcd(sizes.k_group, sizes.v_group)
    block = 32 if q.dtype == torch.float32 or max(q.shape[-1], v.shape[-1]) > 128 else 64
    reads = Rules() if positions is not None else rules
    stretch = Stretch.of(reads, place, queries, sizes.keys, block)
    wanted = splits or _splits(q, stretch.blocks, batch * heads // members)
    per = max(1, cut(stretch.blocks, wanted))
    splits = max(1, cut(stretch.blocks, per))
    width = v.shape[-1]
    part = q.new_empty(splits, batch, heads, queries, width, dtype=torch.float32)
    part_lse = q.new_empty(splits, batch, heads, queries, dtype=torch.float32)
    out = q.new_empty(batch, queries, heads, width, dtype=v.dtype).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    factor, cap = scales(scale, softcap)
    spaces = widths(q, v)
    reading = Launch(
        decode_kernel,
        splits * batch * heads // members,
        {
            "q": q, "k": k, "v": v, "positions": positions, "part": part, "part_lse": part_lse,
            "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
            "hidden": hidden, "rules": rules, "sizes": sizes, "scale": factor, "cap": cap,
            "place": place, "members": members, "head_blocks": stretch.head_blocks,
            "tail": stretch.tail, "count": stretch.blocks, "per": per, "splits": splits,
            "live": live,
            "M": rows_for(members * queries, 1 << 30), "N": block, **spaces,
        },
        4,
        2 if q.dtype == torch.float32 or members * queries > MANY_ROWS else 3,
    )  # fmt: skip
    joining = Launch(
        join_kernel,
        batch * heads * queries,
        {
            "part": part, "part_lse": part_lse, "sinks": sinks, "out": out, "lse": lse,
            "out_strides": out.stride(), "sizes": sizes, "splits": splits,
            "SPLITS": 1 << (splits - 1).bit_length(), "V_WIDTH": width,
            "V_SPACE": spaces["V_SPACE"],
        },
    )  # fmt: skip
    return (reading, joining), out, lse


def _splits(q: Tensor, blocks: int, programs: int) -> int:
    """Return in how many stretches the keys are read, so that every processor has two programs."""
    processors = 1
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(cut(2 * processors, programs), cut(blocks, LEAST_BLOCKS), 128))
