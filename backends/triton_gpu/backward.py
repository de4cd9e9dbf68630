"""Gradients of attention by a plan of tiles: the weights are computed again from the log-sum-exp.

With p = 2^(x - L) and D = sum_e do o - dL of a row: dx = p (do v^T - D), dq = dx k, dk = dx^T q,
dv = p^T do, all times the scale at the end; under a cap dx is times 1 - tanh^2. Gradients of
queries go by the plan, those of keys and values by the plan read by the other axis, with scores
transposed, so that no product needs a transposed accumulator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.backends.triton_gpu.forward import Lists, sizes_of, widths
from attnopt.backends.triton_gpu.launching import (
    LOG2_E,
    Launch,
    cut,
    rows_for,
    rows_within,
    scales,
)
from attnopt.backends.triton_gpu.masking import Hidden, Rules, hide
from attnopt.backends.triton_gpu.shapes import chip_of, key_shape, query_shape
from attnopt.backends.triton_gpu.tiles import load_rows, product, scores, store_rows
from attnopt.ops.plans import BlockPlan, transposed


@triton.jit
def queries_kernel(
    q, k, v, grad, lse, delta, grad_q, q_strides, k_strides, v_strides, grad_strides,
    grad_q_strides, lists, hidden, rules, sizes, scale, cap, slope, Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    SPACE: tl.constexpr, V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr, AXES: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Give M queries of one head their gradient."""
    blocks = tl.cdiv(sizes.queries, M)
    first = (blocks - 1 - tl.program_id(0) % blocks) * M
    h = (tl.program_id(0) // blocks) % sizes.heads
    b = (tl.program_id(0) // blocks // sizes.heads).to(tl.int64)
    q += b * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k += b * k_strides[0] + (h // sizes.k_group).to(tl.int64) * k_strides[1]
    v += b * v_strides[0] + (h // sizes.v_group).to(tl.int64) * v_strides[1]
    grad += b * grad_strides[0] + h.to(tl.int64) * grad_strides[1]
    query = load_rows(q, first, q_strides, sizes.queries, M, WIDTH, SPACE)
    error = load_rows(grad, first, grad_strides, sizes.queries, M, V_WIDTH, V_SPACE)
    row = first + tl.arange(0, M)
    place = (b * sizes.heads + h) * sizes.queries + row
    total = tl.load(lse + place, mask=row < sizes.queries, other=float("inf"))
    drop = tl.load(delta + place, mask=row < sizes.queries, other=0.0)
    line = b * lists.batch + (h // lists.group) * lists.rows + first // Q_TILE
    found = tl.full([M, SPACE], 0.0, tl.float32)
    if lists.full_count is not None:
        found = _visit_keys(
            found, query, error, total, drop, k, v, k_strides, v_strides,
            lists.full_index + line * lists.full_width, tl.load(lists.full_count + line), hidden,
            rules, b, h, first, sizes, scale, cap, K_TILE, M, N, WIDTH, SPACE, V_WIDTH, V_SPACE,
            AXES, CUT, False,
        )  # fmt: skip
    found = _visit_keys(
        found, query, error, total, drop, k, v, k_strides, v_strides,
        lists.index + line * lists.width, tl.load(lists.count + line), hidden, rules, b, h, first,
        sizes, scale, cap, K_TILE, M, N, WIDTH, SPACE, V_WIDTH, V_SPACE, AXES, CUT, True,
    )  # fmt: skip
    grad_q += b * grad_q_strides[0] + h.to(tl.int64) * grad_q_strides[1]
    store_rows(grad_q, found * slope, first, grad_q_strides, sizes.queries, M, WIDTH, SPACE)


@triton.jit
def _visit_keys(
    found, query, error, total, drop, k, v, k_strides, v_strides, index, count, hidden, rules, b,
    h, first, sizes, scale, cap, K_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr,
    AXES: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys of the tiles listed give to the gradient of the queries."""
    parts: tl.constexpr = K_TILE // N
    row = (first + tl.arange(0, M))[:, None]
    for step in tl.range(count * parts):
        start = tl.load(index + step // parts) * K_TILE + step % parts * N
        key = load_rows(k, start, k_strides, sizes.keys, N, WIDTH, SPACE)
        x = scores(query, key, scale, cap, M, N)
        column = (start + tl.arange(0, N))[None, :]
        shown = hide(
            x, hidden, rules, b, h, row, column, row + sizes.keys - sizes.queries, column,
            sizes.queries, sizes.keys, AXES, MASKED, CUT,
        )  # fmt: skip
        weights = tl.exp2(shown - total[:, None])
        value = load_rows(v, start, v_strides, sizes.keys, N, V_WIDTH, V_SPACE)
        slopes = product(error, tl.trans(value), tl.full([M, N], 0.0, tl.float32))
        slopes = _uncapped(weights * (slopes - drop[:, None]), x, cap)
        found = product(slopes.to(key.dtype), key, found)
    return found


@triton.jit
def keys_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, q_strides, k_strides, v_strides, grad_strides,
    grad_k_strides, grad_v_strides, lists, hidden, rules, sizes, scale, cap, slope,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr, V_SPACE: tl.constexpr,
    AXES: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Give N keys and values of one key head their gradients, from all heads that read them."""
    blocks = tl.cdiv(sizes.keys, N)
    key_heads = sizes.heads // sizes.k_group
    first = tl.program_id(0) % blocks * N
    head = (tl.program_id(0) // blocks) % key_heads
    b = (tl.program_id(0) // blocks // key_heads).to(tl.int64)
    k += b * k_strides[0] + head.to(tl.int64) * k_strides[1]
    v += b * v_strides[0] + head.to(tl.int64) * v_strides[1]
    key = load_rows(k, first, k_strides, sizes.keys, N, WIDTH, SPACE)
    value = load_rows(v, first, v_strides, sizes.keys, N, V_WIDTH, V_SPACE)
    found_k = tl.full([N, SPACE], 0.0, tl.float32)
    found_v = tl.full([N, V_SPACE], 0.0, tl.float32)
    for member in tl.range(sizes.k_group):
        h = head * sizes.k_group + member
        its_q = q + b * q_strides[0] + h.to(tl.int64) * q_strides[1]
        its_grad = grad + b * grad_strides[0] + h.to(tl.int64) * grad_strides[1]
        line = b * lists.batch + (h // lists.group) * lists.rows + first // K_TILE
        if lists.full_count is not None:
            found_k, found_v = _visit_queries(
                found_k, found_v, key, value, its_q, its_grad, lse, delta, q_strides, grad_strides,
                lists.full_index + line * lists.full_width, tl.load(lists.full_count + line),
                hidden, rules, b, h, first, sizes, scale, cap, Q_TILE, M, N, WIDTH, SPACE, V_WIDTH,
                V_SPACE, AXES, CUT, False,
            )  # fmt: skip
        found_k, found_v = _visit_queries(
            found_k, found_v, key, value, its_q, its_grad, lse, delta, q_strides, grad_strides,
            lists.index + line * lists.width, tl.load(lists.count + line), hidden, rules, b, h,
            first, sizes, scale, cap, Q_TILE, M, N, WIDTH, SPACE, V_WIDTH, V_SPACE, AXES, CUT, True,
        )  # fmt: skip
    grad_k += b * grad_k_strides[0] + head.to(tl.int64) * grad_k_strides[1]
    store_rows(grad_k, found_k * slope, first, grad_k_strides, sizes.keys, N, WIDTH, SPACE)
    grad_v += b * grad_v_strides[0] + head.to(tl.int64) * grad_v_strides[1]
    store_rows(grad_v, found_v, first, grad_v_strides, sizes.keys, N, V_WIDTH, V_SPACE)


@triton.jit
def _visit_queries(
    found_k, found_v, key, value, q, grad, lse, delta, q_strides, grad_strides, index, count,
    hidden, rules, b, h, first, sizes, scale, cap, Q_TILE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr, V_WIDTH: tl.constexpr,
    V_SPACE: tl.constexpr, AXES: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries of the tiles listed give; scores are (keys, queries)."""
    parts: tl.constexpr = Q_TILE // M
    column = (first + tl.arange(0, N))[:, None]
    for step in tl.range(count * parts):
        start = tl.load(index + step // parts) * Q_TILE + step % parts * M
        query = load_rows(q, start, q_strides, sizes.queries, M, WIDTH, SPACE)
        x = scores(key, query, scale, cap, N, M)
        row = start + tl.arange(0, M)
        place = (b * sizes.heads + h) * sizes.queries + row
        total = tl.load(lse + place, mask=row < sizes.queries, other=float("inf"))
        drop = tl.load(delta + place, mask=row < sizes.queries, other=0.0)
        shown = hide(
            x, hidden, rules, b, h, row[None, :], column,
            row[None, :] + sizes.keys - sizes.queries, column, sizes.queries, sizes.keys, AXES,
            MASKED, CUT,
        )  # fmt: skip
        weights = tl.exp2(shown - total[None, :])
        error = load_rows(grad, start, grad_strides, sizes.queries, M, V_WIDTH, V_SPACE)
        found_v = product(weights.to(error.dtype), error, found_v)
        slopes = product(value, tl.trans(error), tl.full([N, M], 0.0, tl.float32))
        slopes = _uncapped(weights * (slopes - drop[None, :]), x, cap)
        found_k = product(slopes.to(query.dtype), query, found_k)
    return found_k, found_v


@triton.jit
def _uncapped(slopes, x, cap):
    """Take gradients of capped scores back through the cap."""
    if cap is not None:
        slopes = slopes * (1.0 - (x / cap) * (x / cap))
    return slopes


@triton.jit
def delta_kernel(
    out, grad, delta, out_strides, grad_strides, sizes, M: tl.constexpr, V_WIDTH: tl.constexpr,
    V_SPACE: tl.constexpr,
):  # fmt: skip
    """Sum the products of M outputs of one head with their gradients."""
    blocks = tl.cdiv(sizes.queries, M)
    first = tl.program_id(0) % blocks * M
    h = (tl.program_id(0) // blocks) % sizes.heads
    b = (tl.program_id(0) // blocks // sizes.heads).to(tl.int64)
    out += b * out_strides[0] + h.to(tl.int64) * out_strides[1]
    grad += b * grad_strides[0] + h.to(tl.int64) * grad_strides[1]
    x = load_rows(out, first, out_strides, sizes.queries, M, V_WIDTH, V_SPACE).to(tl.float32)
    y = load_rows(grad, first, grad_strides, sizes.queries, M, V_WIDTH, V_SPACE).to(tl.float32)
    row = first + tl.arange(0, M)
    place = delta + (b * sizes.heads + h) * sizes.queries + row
    tl.store(place, tl.sum(x * y, 1), mask=row < sizes.queries)


def delta_launch(out: Tensor, grad: Tensor, rows: int = 64) -> tuple[Launch, Tensor]:
    """Return what to run, and the (B, H, T) that it fills."""
    batch, heads, queries, _ = out.shape
    rows = rows_for(queries, rows)
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    cuts = {name: n for name, n in widths(out, out).items() if name.startswith("V")}
    arguments = {
        "out": out, "grad": grad, "delta": delta, "out_strides": out.stride(),
        "grad_strides": grad.stride(), "sizes": sizes_of(out, out, out),
        "M": rows, **cuts,
    }  # fmt: skip
    return Launch(delta_kernel, cut(queries, rows) * batch * heads, arguments), delta


def backward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: BlockPlan,
    hidden: Hidden,
    rules: Rules,
    *,
    scale: float,
    softcap: float | None,
    chip: int | None = None,
) -> tuple[tuple[Launch, Launch], tuple[Tensor, Tensor, Tensor]]:
    """Return what to run, and the gradients of q, k and v that it fills.

    `lse` counts the sinks, and is infinite where a query sees nothing; keys and values have
    equally many heads.
    """
    batch, heads, queries, _ = q.shape
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    factor, cap = scales(scale, softcap)
    common = {
        "q": q, "k": k, "v": v, "grad": grad, "lse": lse * LOG2_E, "delta": delta,
        "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
        "grad_strides": grad.stride(), "hidden": hidden, "rules": rules,
        "sizes": sizes_of(q, k, v), "scale": factor, "cap": cap, "slope": scale,
        "Q_TILE": plan.q_tile, "K_TILE": plan.k_tile, **widths(q, v),
        "AXES": 0 if hidden.place is None else hidden.place.shape[-1],
        "CUT": k.shape[2] % plan.k_tile != 0,
    }  # fmt: skip
    width = max(q.shape[-1], v.shape[-1])
    chip = chip or chip_of(q)
    tensors = hidden.mask is not None or hidden.bias is not None
    by_query = query_shape(width, q.dtype, chip)
    by_key = key_shape(width, q.dtype, chip, tensors=tensors)
    rows = rows_within(plan.q_tile, rows_for(queries, by_query.queries))
    of_queries = Launch(
        queries_kernel,
        cut(queries, rows) * batch * heads,
        {
            **common, "grad_q": grads[0], "grad_q_strides": grads[0].stride(),
            "lists": Lists.of(plan, heads), "M": rows,
            "N": rows_within(plan.k_tile, by_query.keys),
        },
        by_query.warps,
        by_query.stages,
    )  # fmt: skip
    columns = rows_within(plan.k_tile, rows_for(k.shape[2], by_key.keys))
    of_keys = Launch(
        keys_kernel,
        cut(k.shape[2], columns) * batch * k.shape[1],
        {
            **common, "grad_k": grads[1], "grad_v": grads[2],
            "grad_k_strides": grads[1].stride(), "grad_v_strides": grads[2].stride(),
            "lists": Lists.of(transposed(plan, k.shape[2]), heads),
            "M": rows_within(plan.q_tile, by_key.queries), "N": columns,
        },
        by_key.warps,
        by_key.stages,
    )  # fmt: skip
    return (of_queries, of_keys), grads
