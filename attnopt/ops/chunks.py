"""Linear attention chunk by chunk: the fast copies of `attnopt.ops.linear`.

A chunk of queries weighs the keys near it one by one, its window among them; what lies before them
comes by way of the state. All chunks of a segment go together. A compiled graph calls this and does
not hold it. Letters as in `attnopt.ops.linear`; n chunks of c queries read m + 1 chunks of keys.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.hidden import Memo
from attnopt.ops.linear import (
    Mixing,
    linear_attention_reference,
    linear_attention_step_reference,
)
from attnopt.ops.opaque_linear import opaque
from attnopt.ops.window import held_sides, positions_of, ring_of

# The queries of a chunk: fewer where there are few, but no fewer than the least.
CHUNK: Final = 64
LEAST_CHUNK: Final = 16
# Weights of a segment: more of them leave the cache.
_MOST: Final = 2**19


def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor | None = None,
    map_k: Tensor | None = None,
    gate: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    padding: Tensor | None = None,
    memo: Memo | None = None,
    **settings: Any,
) -> Tensor:
    """Return what the reference returns, in time that is linear in the number of keys."""
    if torch.compiler.is_compiling():
        own = {"map_q": map_q, "map_k": map_k, "gate": gate, "decay": decay, "padding": padding}
        found: Tensor = linear_attention_fast(q=q, k=k, v=v, **own, **{"causal": False, **settings})
        return found
    mixing = Mixing(map_q, map_k, gate, decay, **settings)
    if q.shape[2] == 1 and mixing.causal:
        return linear_attention_reference(
            q, k, v, map_q, map_k, gate, decay, padding=padding, **settings
        )
    wide, keys, values = mixing.widened(q, k, v)
    if not mixing.causal:
        state = mixing.of_keys(keys, padding).transpose(-1, -2) @ values
        return mixing.divided(mixing.of_queries(wide, None) @ state, v.dtype)
    return mixing.divided(_by_chunks(wide, keys, values, mixing, padding), v.dtype)


def attend_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor | None,
    map_k: Tensor | None,
    gate: Tensor | None,
    decay: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    state: Tensor,
    past_length: int,
    *,
    padding: Tensor | None = None,
    memo: Memo | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the reference returns: by chunks at the start, by the state step by step."""
    if torch.compiler.is_compiling():
        own = {"map_q": map_q, "map_k": map_k, "gate": gate, "decay": decay, "padding": padding}
        pasts = {"past_k": past_k, "past_v": past_v, "state": state, "past_length": past_length}
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = linear_attention_step_fast(q=q, k=k, v=v, **own, **pasts, **settings)
        return found
    mixing = Mixing(map_q, map_k, gate, decay, causal=True, **settings)
    given = (q, k, v, past_k, past_v, state, past_length, padding)
    if past_length == 0:
        return _begin(mixing, q, k, v, past_k, state, padding)
    if q.shape[2] == 1 and past_k.shape[2] == mixing.window:
        return _one(mixing, *given)
    maps = (map_q, map_k, gate, decay)
    return linear_attention_step_reference(
        q, k, v, *maps, past_k, past_v, state, past_length, padding=padding, **settings
    )


def _begin(
    mixing: Mixing, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, state: Tensor,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend where nothing was seen before."""
    wide, keys, values = mixing.widened(q, k, v)
    sums = _by_chunks(wide, keys, values, mixing, padding)
    tokens = q.shape[2]
    left = max(tokens - mixing.window, 0)
    hidden = None if padding is None else padding[..., :left]
    of_key = mixing.of_keys(keys[:, :, :left], hidden)
    after = _folded(mixing, of_key, values[:, :, :left])
    rings = [ring_of(x, tokens, past_k.shape[2], 0) for x in (k, v)]
    return mixing.divided(sums, v.dtype), rings[0], rings[1], after.to(state.dtype)


def _one(
    mixing: Mixing, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, state: Tensor,
    past_length: int, padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend with one query: the key that leaves the window goes into the state."""
    window = mixing.window
    now = state.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if mixing.decay is not None:
        now = now * mixing.decay.to(now.dtype).view(-1, 1, 1)
    leaves = past_length - window
    if leaves >= 0:
        at = leaves % window if window else 0
        key, value = (x[:, :, at : at + 1] if window else y for x, y in ((past_k, k), (past_v, v)))
        hidden = None if padding is None else padding[..., leaves : leaves + 1]
        _, key, value = mixing.widened(q, key, value)
        now = now + mixing.of_keys(key, hidden).transpose(-1, -2) @ value
    if not window:
        wide = q.to(now.dtype)
        found = mixing.divided(mixing.of_queries(wide, None) @ now, v.dtype)
        return found, past_k, past_v, now.to(state.dtype)
    slot = torch.full((1,), past_length % window, device=q.device)
    past_k, past_v = past_k.index_copy(2, slot, k), past_v.index_copy(2, slot, v)
    wide, keys, values = mixing.widened(q, past_k, past_v)
    scores = mixing.scaled(wide) @ keys.transpose(-1, -2)
    if leaves < -1 or padding is not None:
        held = positions_of(window, past_length + 1, 0, q.device)
        seen = (held >= 0).view(1, 1, 1, -1)
        shown = held_sides(padding, held)
        scores = scores.masked_fill(~(seen if shown is None else seen & shown), -torch.inf)
    weights, top = mixing.near(scores)
    before = mixing.of_queries(wide, top) @ now
    if mixing.decay is not None:
        before = before * mixing.decay.to(wide.dtype).view(-1, 1, 1) ** window
    found = mixing.divided(weights @ values + before, v.dtype)
    return found, past_k, past_v, now.to(state.dtype)


def _folded(mixing: Mixing, of_key: Tensor, v: Tensor) -> Tensor:
    """Return the state of some keys, decayed to the last of them."""
    if mixing.decay is not None:
        age = torch.arange(v.shape[2] - 1, -1, -1, device=v.device)
        weight = mixing.powers(age, v)
        assert weight is not None
        of_key = of_key * weight.unsqueeze(-1)
    return of_key.transpose(-1, -2) @ v


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, padding: Tensor | None) -> Tensor:
    """Return the sums (B, H, T, E + 1) of queries at the end of the keys, segment by segment."""
    tokens, keys = q.shape[2], k.shape[2]
    bands = _Bands(mixing, min(CHUNK, max(LEAST_CHUNK, tokens)), q.device)
    size, reach = bands.size, bands.reach
    chunks = -(-tokens // size)
    early = max(keys - tokens - reach, 0)
    of_key = mixing.of_keys(k, padding)
    state = _folded(mixing, of_key[:, :, :early], v[:, :, :early])
    missing = max(reach - (keys - tokens), 0)
    ends = (missing, chunks * size - tokens)
    shown = None
    if mixing.window and (padding is not None or missing):
        shown = q.new_ones(1, 1, 1, keys, dtype=torch.bool) if padding is None else padding
        shown = F.pad(shown[..., early:], ends, value=False)
    q = F.pad(q, (0, 0, 0, ends[1]))
    k, v, of_key = (F.pad(x[:, :, early:], (0, 0, *ends)) for x in (k, v, of_key))
    together = max(1, _MOST // (q.shape[0] * q.shape[1] * size * (reach + size))) * size
    found: list[Tensor] = []
    for first in range(0, chunks * size, together):
        stop = min(first + together, chunks * size)
        cut = slice(first, stop + reach)
        part = None if shown is None else shown[..., cut]
        near_k, near_v, near_features = (x[:, :, cut] for x in (k, v, of_key))
        sums, state = bands.attend(q[:, :, first:stop], near_k, near_v, near_features, part, state)
        found.append(sums)
    return torch.cat(found, dim=2)[:, :, :tokens]


@dataclass(frozen=True)
class _Bands:
    """How the queries of a chunk stand to the keys of the chunks that they read."""

    mixing: Mixing
    size: int
    device: torch.device

    @property
    def before(self) -> int:
        """The chunks of keys before a query's own that its window may reach into."""
        return -(-self.mixing.window // self.size)

    @property
    def reach(self) -> int:
        """The keys before a chunk of queries that are read one by one."""
        return self.before * self.size

    def distance(self) -> Tensor:
        """How far each query (c) is behind each key ((m + 1) c)."""
        column = torch.arange(self.reach + self.size, device=self.device)
        return column[self.reach :].unsqueeze(1) - column

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, of_key: Tensor, shown: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of whole chunks of queries, and the state after the last.

        Before the keys of the queries stand those that their windows reach into.
        """
        mixing, size = self.mixing, self.size
        query, key, value, of_key = (x.unflatten(2, (-1, size)) for x in (q, k, v, of_key))
        count, top, sums = query.shape[2], None, None
        values = self._spread(value, count)
        if mixing.window:
            marks = None if shown is None else shown[:, :, 0].unflatten(2, (-1, size))
            near, top = self._near(query, self._spread(key, count), marks)
            sums, top = near @ values, top.flatten(2, 3)
        of_query = mixing.of_queries(q, top).unflatten(2, (-1, size))
        # Keys of a query's own chunk are far only where the window ends within it.
        last = self.reach if mixing.window >= size else self.reach + size
        distance = self.distance()[:, :last]
        weights = of_query @ self._spread(of_key, count)[..., :last, :].transpose(-1, -2)
        age = mixing.powers(distance.clamp(min=0), q)
        if age is not None:
            weights = weights * age.unsqueeze(1)
        far = weights.masked_fill_(distance < mixing.window, 0.0) @ values[..., :last, :]
        states = self._states(of_key[:, :, :count], value[:, :, :count], state)
        before = of_query @ states[:, :, :-1]
        if mixing.decay is not None:
            row = torch.arange(size, device=q.device) + self.reach + 1
            weight = mixing.powers(row, q)
            assert weight is not None
            before = before * weight.view(-1, 1, size, 1)
        sums = far + before if sums is None else sums + far + before
        return sums.flatten(2, 3), states[:, :, -1]

    def _spread(self, x: Tensor, count: int) -> Tensor:
        """Put beside each chunk (B, H, n, c, .) those that its window reaches into."""
        if not self.before:
            return x
        return torch.cat([x[:, :, i : i + count] for i in range(self.before + 1)], dim=3)

    def _near(self, query: Tensor, key: Tensor, marks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights of the keys in the windows, and the largest scores."""
        distance = self.distance()
        hidden = (distance < 0) | (distance >= self.mixing.window)
        if marks is not None:
            shown = self._spread(marks.unsqueeze(-1), query.shape[2])
            hidden = hidden | ~shown.transpose(-1, -2)
        scores = self.mixing.scaled(query) @ key.transpose(-1, -2)
        return self.mixing.near(scores.masked_fill_(hidden, -torch.inf))

    def _states(self, of_key: Tensor, value: Tensor, state: Tensor) -> Tensor:
        """Return the state before each chunk and after the last (B, H, n + 1, F, E + 1)."""
        mixing, size = self.mixing, self.size
        if mixing.decay is None:
            new = of_key.transpose(-1, -2) @ value
            return torch.cat([state.unsqueeze(2), new], dim=2).cumsum(dim=2)
        last = torch.arange(size - 1, -1, -1, device=value.device)
        weight = mixing.powers(last, value)
        assert weight is not None
        new = (of_key * weight.view(-1, 1, size, 1)).transpose(-1, -2) @ value
        terms = torch.cat([state.unsqueeze(2), new], dim=2)
        chunk = torch.arange(terms.shape[2], device=value.device)
        gap = (chunk.unsqueeze(1) - chunk) * size
        passed = mixing.powers(gap.clamp(min=0), value)
        assert passed is not None
        mixed: Tensor = passed.masked_fill(gap < 0, 0.0) @ terms.flatten(3)
        return mixed.view(terms.shape)


linear_attention_fast = opaque("linear_attention_fast", attend_linear, steps=False)
linear_attention_step_fast = opaque("linear_attention_step_fast", attend_linear_step, steps=True)
