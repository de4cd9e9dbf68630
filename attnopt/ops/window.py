"""Attention within a window, over a state of constant size: a ring of the last keys.

The state holds the `first` keys and values and the last `window` ones. Token number n lies in slot
n while n < first, and in slot first + (n - first) mod window after that, so nothing is ever moved:
what is in a slot follows from how many tokens were seen. With `chunked`, tokens see no window but
the chunk of as many tokens that they are in. Axis letters as in
`attnopt.ops.attention`; R slots. Side operands (bias, mask, padding) have a place for every token
seen, as if all keys were there.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.attention import UNSTRUCTURED_SCHEMA, attention_reference
from attnopt.ops.sdpa import Memo, attend
from attnopt.ops.structure import chunk_of

_SIDES = ("bias", "mask", "padding")


def positions_of(slots: int, seen: Any, first: int, device: torch.device) -> Tensor:
    """Return the number of the token in each slot after so many were seen; -1 where none is."""
    slot = torch.arange(slots, device=device)
    turns = torch.div(seen - 1 - slot, max(slots - first, 1), rounding_mode="floor")
    last = torch.where(slot < first, slot, slot + turns * (slots - first))
    return torch.where(slot < seen, last, -1)


def ring_of(whole: Tensor, seen: Any, slots: int, first: int) -> Tensor:
    """Return the ring of the last tokens of `whole` (B, H, S, D), of which `seen` were seen."""
    held = positions_of(slots, seen, first, whole.device)
    place = (held - (seen - whole.shape[2])).clamp(min=0)
    empty = (held < 0).view(1, 1, -1, 1)
    padded = whole if whole.shape[2] else whole.new_zeros(*whole.shape[:2], 1, whole.shape[3])
    return padded.index_select(2, place).masked_fill(empty, 0.0)


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_length: int,
    *,
    window: int,
    first: int = 0,
    chunked: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, T, E), and the rings of keys and values (B, Hk, R, D or E)."""
    tokens, slots, device = q.shape[2], past_k.shape[2], q.device
    held = positions_of(slots, past_length, first, device)
    query = torch.arange(tokens, device=device) + past_length
    key = torch.cat([held, query])
    options |= {n: held_sides(options.get(n), key) for n in _SIDES}
    gap = query.unsqueeze(1) - key
    near = gap < window
    if chunked:
        near = chunk_of(query, window).unsqueeze(1) == chunk_of(key, window)
    seen = (key >= 0) & (gap >= 0) & (near | (key < first))
    mask = options.pop("mask")
    if mask is not None:
        seen = seen & mask
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    found = attention_reference(q, keys, values, mask=seen, **options)[0]
    rings = [next_ring(x, held, past_length, tokens, first) for x in (keys, values)]
    return found, rings[0], rings[1]


def held_sides(side: Tensor | None, key: Tensor) -> Tensor | None:
    """Choose the places of a side operand that belong to keys that are held."""
    if side is None or side.dim() < 1 or side.shape[-1] == 1:
        return side
    return side.index_select(-1, key.clamp(min=0))


def next_ring(keys: Tensor, held: Tensor, past_length: Any, tokens: Any, first: int) -> Tensor:
    """Return the ring after a call, from the ring before it and the new tokens behind it."""
    slots = held.shape[0]
    now = positions_of(slots, past_length + tokens, first, keys.device)
    same = torch.arange(slots, device=keys.device)
    return keys.index_select(2, torch.where(now == held, same, now - past_length + slots))


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_length: int,
    *,
    window: int,
    first: int = 0,
    chunked: bool = False,
    memo: Memo | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference returns: by bands at the start, by the ring alone step by step."""
    slots, ring = past_k.shape[2], (past_k, past_v, past_length)
    if chunked and (first or slots != window):
        return window_attention_reference(
            q, k, v, *ring, window=window, first=first, chunked=chunked, **options
        )
    if past_length == 0:
        found = attend(q, k, v, memo, **options, **_structure(window, first, chunked))
        rings = [ring_of(x, q.shape[2], slots, first) for x in (k, v)]
        return found, rings[0], rings[1]
    if q.shape[2] != 1 or slots != first + window:
        return _chunk(
            q, k, v, *ring, window=window, first=first, chunked=chunked, memo=memo, **options
        )
    seen = past_length + 1
    slot = past_length if past_length < first else first + (past_length - first) % window
    at = torch.full((1,), slot, device=q.device)
    keys, values = past_k.index_copy(2, at, k), past_v.index_copy(2, at, v)
    # The tokens of a chunk fill the ring from its start.
    filled = slot + 1 if chunked else slots if seen >= slots else seen
    sides = {n: x for n in _SIDES if (x := options.get(n)) is not None}
    if sides:
        held = positions_of(slots, seen, first, q.device)
        options |= {n: held_sides(x, held[:filled]) for n, x in sides.items()}
    return attend(q, keys[:, :, :filled], values[:, :, :filled], memo, **options), keys, values


def _structure(window: int, first: int, chunked: bool) -> dict[str, Any]:
    """Return what positions hide, as options of the canonical attention."""
    if chunked:
        return {"causal": True, "chunk": window}
    return {"causal": True, "window": window, "first": first or None}


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: int, *,
    window: int, first: int, chunked: bool, memo: Memo | None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend with several queries behind a ring, brought into the order of its tokens."""
    slots, tokens = past_k.shape[2], q.shape[2]
    held = positions_of(slots, past_length, first, q.device)
    # Of chunks, the keys begin where one of them does.
    kept = past_length % window if chunked else min(past_length, slots)
    order = torch.argsort(held)[slots - kept :]
    keys, values = (
        torch.cat([past.index_select(2, order), new], dim=2)
        for past, new in ((past_k, k), (past_v, v))
    )
    new = torch.arange(tokens, device=q.device) + past_length
    key = torch.cat([held[order], new])
    options |= {n: held_sides(x, key) for n in _SIDES if (x := options.get(n)) is not None}
    found = attend(q, keys, values, memo, **options, **_structure(window, first, chunked))
    joined = (torch.cat(pair, dim=2) for pair in ((past_k, k), (past_v, v)))
    rings = [next_ring(x, held, past_length, tokens, first) for x in joined]
    return found, rings[0], rings[1]


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "window_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, "
    f"SymInt past_length, *, int window, int first=0, bool chunked=False, {UNSTRUCTURED_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("window_attention", window_attention_reference, "CompositeImplicitAutograd")

window_attention = torch.ops.attnopt.window_attention.default
