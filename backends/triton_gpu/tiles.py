"""Steps that the kernels share: rows in and out, products of tiles, scores.

Strides are those of (B, H, T, D); a base points at the first row of one head.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def interprets() -> bool:
    """Tell whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, total):
    """Return total + a b, accumulated in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as integers and multiplies those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scores(query, key, scale, cap, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the scores of queries and keys in base two; either may be rows."""
    zeros = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    return capped(product(query, tl.trans(key), zeros), scale, cap)


@triton.jit
def capped(x, scale, cap):
    """Scale raw scores, and cap them: c tanh(x), tanh by one exponential."""
    x = x * scale
    if cap is not None:
        x = cap * (2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0)
    return x


@triton.jit
def load_rows(
    base, first, strides, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr
):
    """Load rows of one head, from the first on, with zeros where there are none."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, SPACE)
    base += first.to(tl.int64) * strides[2]
    inside = (first + row < count)[:, None]
    if WIDTH != SPACE:
        inside = inside & (channel < WIDTH)[None, :]
    place = row[:, None] * strides[2] + channel[None, :] * strides[3]
    return tl.load(base + place, mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, x, first, strides, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPACE: tl.constexpr
):
    """Store rows of one head, as far as they exist."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, SPACE)
    base += first.to(tl.int64) * strides[2]
    inside = (first + row < count)[:, None] & (channel < WIDTH)[None, :]
    place = row[:, None] * strides[2] + channel[None, :] * strides[3]
    tl.store(base + place, x.to(base.dtype.element_ty), mask=inside)
