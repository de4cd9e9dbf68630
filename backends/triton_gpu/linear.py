"""Sums over far keys: o_i = sum_{j <= i - shift} lam^(i - j) (a_i . b_j) c_j, chunk after chunk.

One kernel runs along the tokens and leaves the state before every chunk, S = sum b_j^T c_j; another
adds what each chunk weighs one by one, which is what lies within `shift` of its queries. Their
gradients are sums of the same kind, two of them from the last token to the first. No accumulator is
transposed, which Triton before 3.7.1 gets wrong on Hopper.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnopt.backends.triton_gpu.launching import Launch, cut, padded_width
from attnopt.backends.triton_gpu.tiles import product

CHUNK = 64
_WIDEST = 64


@triton.jit
def _rows(
    base, first, count, strides, begin, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Load channels from `begin` on of rows from the first on, from the end where it runs back."""
    row = first + tl.arange(0, ROWS)
    channel = begin + tl.arange(0, TILE)
    place = count - 1 - row if BACKWARDS else row
    inside = ((row >= 0) & (row < count))[:, None] & (channel < WIDTH)[None, :]
    spot = place.to(tl.int64)[:, None] * strides[2] + channel[None, :] * strides[3]
    return tl.load(base + spot, mask=inside, other=0.0)


@triton.jit
def linear_states_kernel(
    b, c, states, decay, b_strides, c_strides, heads, tokens, chunks, C: tl.constexpr,
    B_WIDTH: tl.constexpr, B_TILE: tl.constexpr, C_WIDTH: tl.constexpr, C_TILE: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Leave the state before each chunk, of some features and some channels of one head."""
    b_tiles: tl.constexpr = (B_WIDTH + B_TILE - 1) // B_TILE
    c_tiles: tl.constexpr = (C_WIDTH + C_TILE - 1) // C_TILE
    tile = tl.program_id(0) % (b_tiles * c_tiles)
    which = (tl.program_id(0) // (b_tiles * c_tiles)).to(tl.int64)
    h, row = which % heads, which // heads
    b += row * b_strides[0] + h * b_strides[1]
    c += row * c_strides[0] + h * c_strides[1]
    b_first, c_first = tile // c_tiles * B_TILE, tile % c_tiles * C_TILE
    i, j = b_first + tl.arange(0, B_TILE), c_first + tl.arange(0, C_TILE)
    spot = i.to(tl.int64)[:, None] * C_WIDTH + j[None, :]
    inside = (i < B_WIDTH)[:, None] & (j < C_WIDTH)[None, :]
    states += which * chunks * B_WIDTH * C_WIDTH
    found = tl.full([B_TILE, C_TILE], 0.0, tl.float32)
    if decay is not None:
        rate = tl.log2(tl.load(decay + h).to(tl.float32))
        weight = tl.exp2(rate * (C - 1 - tl.arange(0, C)))[:, None]
        passed = tl.exp2(rate * C)
    for n in tl.range(chunks):
        tl.store(states + spot, found, mask=inside)
        states += B_WIDTH * C_WIDTH
        left = _rows(b, n * C, tokens, b_strides, b_first, C, B_WIDTH, B_TILE, BACKWARDS)
        right = _rows(c, n * C, tokens, c_strides, c_first, C, C_WIDTH, C_TILE, BACKWARDS)
        if decay is not None:
            left = (left * weight).to(left.dtype)
            found = found * passed
        found = product(tl.trans(left), right, found)


@triton.jit
def linear_output_kernel(
    a, b, c, states, out, decay, a_strides, b_strides, c_strides, out_strides, heads, tokens,
    chunks, shift, C: tl.constexpr, BEFORE: tl.constexpr, OWN: tl.constexpr,
    B_WIDTH: tl.constexpr, B_TILE: tl.constexpr, C_WIDTH: tl.constexpr, C_TILE: tl.constexpr,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Give some channels of a chunk of one head: its state, and the keys near it one by one."""
    b_tiles: tl.constexpr = (B_WIDTH + B_TILE - 1) // B_TILE
    c_tiles: tl.constexpr = (C_WIDTH + C_TILE - 1) // C_TILE
    c_first = tl.program_id(0) % c_tiles * C_TILE
    n = tl.program_id(0) // c_tiles % chunks
    which = (tl.program_id(0) // c_tiles // chunks).to(tl.int64)
    h, row = which % heads, which // heads
    a += row * a_strides[0] + h * a_strides[1]
    b += row * b_strides[0] + h * b_strides[1]
    c += row * c_strides[0] + h * c_strides[1]
    out += row * out_strides[0] + h * out_strides[1]
    place = tl.arange(0, C)
    j = c_first + tl.arange(0, C_TILE)
    rate = 0.0
    if decay is not None:
        rate = tl.log2(tl.load(decay + h).to(tl.float32))
    found = tl.full([C, C_TILE], 0.0, tl.float32)
    if n > BEFORE:
        states += (which * chunks + n - BEFORE) * B_WIDTH * C_WIDTH
        for part in tl.static_range(b_tiles):
            left = _rows(a, n * C, tokens, a_strides, part * B_TILE, C, B_WIDTH, B_TILE, BACKWARDS)
            i = part * B_TILE + tl.arange(0, B_TILE)
            spot = i.to(tl.int64)[:, None] * C_WIDTH + j[None, :]
            inside = (i < B_WIDTH)[:, None] & (j < C_WIDTH)[None, :]
            state = tl.load(states + spot, mask=inside, other=0.0)
            found = product(left, state.to(left.dtype), found)
        if decay is not None:
            found = found * tl.exp2(rate * (place + BEFORE * C + 1))[:, None]
    for back in tl.static_range(BEFORE + OWN):
        first = (n - BEFORE + back) * C
        weights = tl.full([C, C], 0.0, tl.float32)
        for part in tl.static_range(b_tiles):
            left = _rows(a, n * C, tokens, a_strides, part * B_TILE, C, B_WIDTH, B_TILE, BACKWARDS)
            right = _rows(b, first, tokens, b_strides, part * B_TILE, C, B_WIDTH, B_TILE, BACKWARDS)
            weights = product(left, tl.trans(right), weights)
        distance = (n * C + place)[:, None] - (first + place)[None, :]
        if decay is not None:
            weights = weights * tl.exp2(rate * tl.maximum(distance, 0))
        weights = tl.where(distance >= shift, weights, 0.0)
        value = _rows(c, first, tokens, c_strides, c_first, C, C_WIDTH, C_TILE, BACKWARDS)
        found = product(weights.to(value.dtype), value, found)
    row = n * C + place
    spot = tokens - 1 - row if BACKWARDS else row
    spot = spot.to(tl.int64)[:, None] * out_strides[2] + j[None, :] * out_strides[3]
    tl.store(out + spot, found, mask=(row < tokens)[:, None] & (j < C_WIDTH)[None, :])


def far_launches(
    a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, *, shift: int, backwards: bool = False
) -> tuple[tuple[Launch, Launch], Tensor]:
    """Return what to run, and the sums (B, H, T, C) in float32 that it fills."""
    batch, heads, tokens, width = a.shape
    chunks, own = cut(tokens, CHUNK), c.shape[3]
    states = a.new_empty(batch, heads, chunks, width, own, dtype=torch.float32)
    out = a.new_empty(batch, heads, tokens, own, dtype=torch.float32)
    tiles = [min(_WIDEST, padded_width(n)) for n in (width, own)]
    common: dict[str, Any] = {
        "b": b, "c": c, "states": states, "decay": decay, "b_strides": b.stride(),
        "c_strides": c.stride(), "heads": heads, "tokens": tokens, "chunks": chunks, "C": CHUNK,
        "B_WIDTH": width, "B_TILE": tiles[0], "C_WIDTH": own, "C_TILE": tiles[1],
        "BACKWARDS": backwards,
    }  # fmt: skip
    parts = [cut(n, tile) for n, tile in zip((width, own), tiles, strict=True)]
    of_states = Launch(linear_states_kernel, batch * heads * parts[0] * parts[1], common)
    arguments = {
        **common, "a": a, "out": out, "a_strides": a.stride(), "out_strides": out.stride(),
        "shift": shift, "BEFORE": cut(shift, CHUNK), "OWN": int(shift < CHUNK),
    }  # fmt: skip
    of_output = Launch(linear_output_kernel, batch * heads * chunks * parts[1], arguments)
    return (of_states, of_output), out


def _sums(
    a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, shift: int, *, backwards: bool = False
) -> Tensor:
    launches, out = far_launches(a, b, c, decay, shift=shift, backwards=backwards)
    for launch in launches:
        launch.run()
    return out


class _Far(torch.autograd.Function):
    """The sums, with gradients of a, b and c."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, shift: int
    ) -> Tensor:
        ctx.save_for_backward(a, b, c, decay)
        ctx.shift = shift
        return _sums(a, b, c, decay, shift)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        a, b, c, decay = ctx.saved_tensors
        grad, shift = grad.to(c.dtype), ctx.shift
        of_a = _sums(grad, c, b, decay, shift)
        of_b = _sums(c, grad, a, decay, shift, backwards=True)
        of_c = _sums(b, a, grad, decay, shift, backwards=True)
        return of_a.to(a.dtype), of_b.to(b.dtype), of_c.to(c.dtype), None, None


def far_sums(a: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, shift: int) -> Tensor:
    """Return the sums (B, H, T, C) of a and b (B, H, T, F) and c (B, H, T, C) in float32."""
    found: Tensor = _Far.apply(a, b, c, decay, shift)
    return found
