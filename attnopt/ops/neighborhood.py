"""Attention on a grid of tokens, each of which sees its neighbourhood.

`attnopt.neighborhoods` says which keys that is, axis by axis. The first `leading` tokens (class,
register or text tokens) stand before the grid; they see everything, and everything sees them. The
grid lies row by row, or with a `tile` tile by tile, as `attnopt.ops.tiles` orders it. Letters and
options are those of `attnopt.ops.attention`; `bias`, `mask` and `padding` are in the order that the
tokens are in.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.neighborhoods import Axis, Neighborhood
from attnopt.ops.attention import attention_reference
from attnopt.ops.tiles import tile_tokens_reference


def neighborhood_attention_reference(
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
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, E) and the log-sum-exp (B, H, T) of attention on a grid."""
    check(q, k, grid, leading)
    hood = Neighborhood.of(grid, window, stride, dilation, causal, border, leading)
    seen = visible_tokens(hood, tile, q.device)
    seen = seen if mask is None else seen & mask
    return attention_reference(q, k, v, mask=seen, **options)


def check(q: Tensor, k: Tensor, grid: Sequence[int], leading: int) -> None:
    """Raise a ValueError where queries and keys are not those of the grid."""
    count = leading + math.prod(grid)
    if (q.shape[2], k.shape[2]) != (count, count):
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys are no grid {list(grid)} after "
            f"{leading} tokens, which has {count} of both"
        )


def visible_tokens(
    hood: Neighborhood, tile: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Return which tokens see which, as booleans (T, T)."""
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in hood.axes:
        along = _visible_along(axis, device)
        both = seen[:, None, :, None] & along[None, :, None, :]
        seen = both.reshape(len(seen) * axis.length, len(seen) * axis.length)
    seen = torch.nn.functional.pad(seen, (hood.leading, 0, hood.leading, 0), value=True)
    if not tile:
        return seen
    for dim in (0, 1):
        seen = tile_tokens_reference(seen, dim, hood.grid, tile, hood.leading)
    return seen


def _visible_along(axis: Axis, device: torch.device | None) -> Tensor:
    """Return which positions of an axis see which, as booleans (L, L)."""
    place = torch.arange(axis.length, device=device)
    residue, query = place % axis.dilation, place // axis.dilation
    last = (axis.length - 1 - residue) // axis.dilation
    group = query // axis.stride * axis.stride
    if axis.causal:
        leader = torch.minimum(group + axis.stride - 1, last)
        start, stop = leader - axis.window + 1, query + 1
    else:
        start = torch.minimum(group + axis.stride // 2, last) - axis.window // 2
        if axis.border == "shift":
            start = torch.minimum(start.clamp(min=0), last + 1 - axis.window)
        stop = start + axis.window
    inside = (query >= start[:, None]) & (query < stop[:, None])
    return inside & (residue == residue[:, None])


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_TAKES = (
    "(Tensor q, Tensor k, Tensor v, *, int[] grid, int[] window, int[] stride, int[] dilation, "
    "bool[] causal, str border='shift', int leading=0, int[] tile=[], Tensor? bias=None, "
    "Tensor? mask=None, Tensor? padding=None, Tensor? sinks=None, float? scale=None, "
    "float? softcap=None, bool mean_if_blind=False, int[]? k_map=None, int[]? v_map=None)"
)


def _forward(*args: Any, **options: Any) -> Tensor:
    return neighborhood_attention_reference(*args, **options)[0]


_LIBRARY.define(f"neighborhood_attention{_TAKES} -> Tensor")
_LIBRARY.define(f"neighborhood_attention_lse{_TAKES} -> (Tensor, Tensor)")
_LIBRARY.impl("neighborhood_attention", _forward, "CompositeImplicitAutograd")
_LIBRARY.impl(
    "neighborhood_attention_lse", neighborhood_attention_reference, "CompositeImplicitAutograd"
)

neighborhood_attention = torch.ops.attnopt.neighborhood_attention.default
neighborhood_attention_lse = torch.ops.attnopt.neighborhood_attention_lse.default
