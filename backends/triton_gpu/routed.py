"""Routed attention: for each key head the queries that are on, packed, over the keys they see.

A program holds M packed rows of one key head, each a token and a query head of its group, and reads
the keys up to its last token, N at a time, by the recurrence of `forward`. Programs beyond the last
row have nothing to read: how many rows there are is known on the device only.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.backends.triton_gpu.forward import sizes_of, widths
from attnopt.backends.triton_gpu.launching import Launch, cut, rows_for, scales
from attnopt.backends.triton_gpu.masking import Hidden, Rules, hide
from attnopt.backends.triton_gpu.shapes import chip_of, routed_shape
from attnopt.backends.triton_gpu.tiles import LN_2, LOG2_E, load_rows, product, scores
from attnopt.ops.blocks import listed


@dataclass(frozen=True)
class Packed:
    """The rows of each key head, `order` (B, Hk, T G): token x G + query head, those on first."""

    order: Tensor
    count: Tensor

    @classmethod
    def of(cls, gates: Tensor, groups: int) -> "Packed":
        """Pack what is on, in the order of tokens."""
        on = (gates != 0).unflatten(1, (groups, -1)).transpose(2, 3).flatten(2)
        count, order = listed(on)
        return cls(order.contiguous(), count.contiguous())


@triton.jit
def routed_kernel(
    q, k, v, out, lse, gates, order, counts, sinks, q_strides, k_strides, v_strides, out_strides,
    gate_strides, hidden, rules, sizes, scale, cap, M: tl.constexpr, N: tl.constexpr,
    WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr,
):  # fmt: skip
    """Attend with M packed rows of one key head."""
    rows = sizes.queries * sizes.k_group
    blocks = tl.cdiv(rows, M)
    # Under causality the last rows take longest: they start first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * M
    line = (tl.program_id(0) // blocks).to(tl.int64)
    groups = sizes.heads // sizes.k_group
    g = line % groups
    b = line // groups
    row = first + tl.arange(0, M)
    count = tl.load(counts + line)
    alive = row < count
    packed = tl.load(order + line * rows + row, mask=alive, other=0)
    token = packed // sizes.k_group
    h = g * sizes.k_group + packed % sizes.k_group
    channel = tl.arange(0, SPACE)
    at = h * q_strides[1] + token.to(tl.int64) * q_strides[2]
    at = b * q_strides[0] + at[:, None] + channel[None, :] * q_strides[3]
    query = tl.load(q + at, mask=alive[:, None] & (channel < WIDTH)[None, :], other=0.0)
    k += b * k_strides[0] + g * k_strides[1]
    v += b * v_strides[0] + g * v_strides[1]
    before = sizes.keys - sizes.queries
    begin, end = _stretch(
        tl.min(tl.where(alive, token, sizes.queries)) + before,
        tl.max(tl.where(alive, token, -1)) + before, rules, sizes.keys, N,
    )  # fmt: skip
    total = tl.full([M], 0.0, tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    found = tl.full([M, V_SPACE], 0.0, tl.float32)
    for step in tl.range(tl.where(first < count, tl.cdiv(end - begin, N), 0)):
        start = begin + step * N
        key = load_rows(k, start, k_strides, sizes.keys, N, WIDTH, SPACE)
        x = scores(query, key, scale, cap, M, N)
        column = (start + tl.arange(0, N))[None, :]
        x = hide(
            x, hidden, rules, b, h[:, None], token[:, None], column, token[:, None] + before,
            column, sizes.queries, sizes.keys, 0, True, True,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v, start, v_strides, sizes.keys, N, V_WIDTH, V_SPACE)
        found = product(weights.to(value.dtype), value, found * shrink[:, None])
        top = new
    logarithm = tl.log2(tl.where(total > 0, total, 1.0))
    place = lse + (b * sizes.heads + h) * sizes.queries + token
    tl.store(place, (top + logarithm) * LN_2, mask=alive)
    if sinks is not None:
        safe = tl.where(top == float("-inf"), 0.0, top)
        total += tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2_E - safe)
    at = b * gate_strides[0] + h * gate_strides[1] + token.to(tl.int64) * gate_strides[2]
    share = tl.load(gates + at, mask=alive, other=0.0).to(tl.float32)
    found = found * (share / tl.where(total > 0, total, 1.0))[:, None]
    channel = tl.arange(0, V_SPACE)
    at = h * out_strides[1] + token.to(tl.int64) * out_strides[2]
    at = b * out_strides[0] + at[:, None] + channel[None, :] * out_strides[3]
    inside = alive[:, None] & (channel < V_WIDTH)[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _stretch(least, most, rules, keys, N: tl.constexpr):
    """Return from where to where queries at the positions `least` to `most` read keys."""
    # A tensor, as the interpreter wants it.
    begin = least * 0
    end = keys
    if rules.ends is not None:
        end = tl.minimum(keys, most + 1)
        if rules.prefix is not None:
            end = tl.minimum(keys, tl.maximum(end, rules.prefix))
    if rules.left is not None and rules.first is None:
        begin = tl.maximum(0, least - rules.left) // N * N
    if rules.chunk is not None:
        begin = tl.maximum(begin, tl.maximum(least, 0) // rules.chunk * rules.chunk // N * N)
    return begin, end


def routed_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    hidden: Hidden,
    rules: Rules,
    *,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    chip: int | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """Return what to run, and the output and the log-sum-exp that it fills where heads are on.

    Keys and values have equally many heads.
    """
    batch, heads, queries, width = q.shape
    out = torch.zeros(batch, queries, heads, v.shape[-1], dtype=v.dtype, device=q.device)
    out = out.transpose(1, 2)
    lse = torch.zeros(batch, heads, queries, dtype=torch.float32, device=q.device)
    rows = heads // k.shape[1] * queries
    shape = routed_shape(max(width, v.shape[-1]), q.dtype, chip or chip_of(q))
    most = rows_for(rows, shape.queries)
    packed = Packed.of(gates, k.shape[1])
    factor, cap = scales(scale, softcap)
    launch = Launch(
        routed_kernel,
        cut(rows, most) * batch * k.shape[1],
        {
            "q": q, "k": k, "v": v, "out": out, "lse": lse, "gates": gates,
            "order": packed.order, "counts": packed.count, "sinks": sinks,
            "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
            "out_strides": out.stride(), "gate_strides": gates.stride(), "hidden": hidden,
            "rules": rules, "sizes": sizes_of(q, k, v), "scale": factor, "cap": cap, "M": most,
            "N": shape.keys, **widths(q, v),
        },
        shape.warps,
        shape.stages,
    )  # fmt: skip
    return launch, out, lse
