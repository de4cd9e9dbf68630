"""Linear attention, alone or behind a window of softmax, with one denominator for both.

y_i = (g sum_near exp(s_ij - m_i) v_j + sum_far lam^(i-j) phi(q_i).phi(k_j) v_j) / the same sums
without the values. Near keys are the last `window` ones, the query's own among them, and far keys
all before them; m_i is the largest near score, g a factor of each head, lam its decay. Features of
the kind `centroids` have exp(-m_i) as a factor, too, so that m_i does not matter. Without a window
all keys that a query sees are far, so that the sums over keys need no scores: a matrix
(F, E) and a normaliser (F) of each head hold all that was seen, the `state`, whose last column the
normaliser is. Axis letters as in `attnopt.ops.attention`; F features (`attnopt.ops.features`). Far
keys are not scaled. A query that sees nothing gives zeros.
https://arxiv.org/abs/2410.10254, https://arxiv.org/abs/2405.17381
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ops import features
from attnopt.ops.window import held_sides, next_ring, positions_of

LEAST = 1e-6


@dataclass(frozen=True)
class Mixing:
    """What a call says beside queries, keys and values."""

    map_q: Tensor | None = None
    map_k: Tensor | None = None
    gate: Tensor | None = None
    decay: Tensor | None = None
    feature: str = "hedgehog"
    window: int = 0
    causal: bool = False
    normalize: bool = True
    least: float = LEAST
    scale: float | None = None
    k_map: Sequence[int] | None = None
    v_map: Sequence[int] | None = None

    def widened(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return wide numbers, a key and value head for each query head, and values with a one."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        heads = q.shape[1]
        keys = _per_query_head(k.to(dtype), heads, self.k_map)
        values = _per_query_head(v.to(dtype), heads, self.v_map)
        return q.to(dtype), keys, torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)

    def of_queries(self, q: Tensor, top: Tensor | None) -> Tensor:
        """Return the features of queries whose largest near score is `top`."""
        return features.of_queries(q, self.map_q, self.feature, top)

    def of_keys(self, k: Tensor, padding: Tensor | None) -> Tensor:
        """Return the features of keys, zeros where padding hides them (B, 1, 1, S)."""
        found = features.of_keys(k, self.map_k, self.feature)
        return found if padding is None else found * padding.transpose(-1, -2)

    def near(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of near keys by their scores, and the largest score of each query.

        Hidden keys have a score of minus infinity.
        """
        top = scores.amax(dim=-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        if self.feature == features.CENTROIDS:
            top = top.detach()  # a factor of all weights alike
        weights = (scores - top).exp_()
        if self.gate is not None:
            weights = weights * self.gate.to(scores.dtype).view(-1, *[1] * (scores.dim() - 2))
        return weights, top

    def scaled(self, q: Tensor) -> Tensor:
        """Return the queries whose products with keys are scores."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def powers(self, distance: Tensor, like: Tensor) -> Tensor | None:
        """Return the decay over distances (H, ...); None where nothing decays."""
        if self.decay is None:
            return None
        shape = (-1, *([1] * distance.dim()))
        return self.decay.to(like.dtype).view(shape) ** distance

    def divided(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide the sums by their last column."""
        found, total = sums[..., :-1], sums[..., -1:]
        if self.normalize:
            found = found / total.clamp(min=self.least)
        return found.to(dtype)


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor | None = None,
    map_k: Tensor | None = None,
    gate: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    padding: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Return the output (B, H, T, E); `padding` (true = visible) is (B, 1, 1, S)."""
    mixing = Mixing(map_q, map_k, gate, decay, **settings)
    _check(mixing)
    wide, keys, values = mixing.widened(q, k, v)
    column = torch.arange(k.shape[2], device=q.device)
    row = column[k.shape[2] - q.shape[2] :]
    distance = row.unsqueeze(1) - column
    sums = key_weights(wide, keys, mixing, distance, padding)[0] @ values
    return mixing.divided(sums, v.dtype)


def linear_attention_step_reference(
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
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the rings of near keys and values, and the state (B, H, F, E + 1).

    `state` holds what left the window, decayed to the moment when its last token did. Padding has a
    place for every token seen.
    """
    mixing = Mixing(map_q, map_k, gate, decay, causal=True, **settings)
    _check(mixing)
    slots, tokens, device = past_k.shape[2], q.shape[2], q.device
    held = positions_of(slots, past_length, 0, device)
    query = torch.arange(tokens, device=device) + past_length
    key = torch.cat([held, query])
    padding = held_sides(padding, key)
    seen = (key >= 0).view(1, 1, 1, -1)
    padding = seen if padding is None else padding & seen
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    wide, keys, values = mixing.widened(q, k, v)
    distance = query.unsqueeze(1) - key
    weights, before = key_weights(wide, keys, mixing, distance, padding, state)
    assert before is not None
    sums = weights @ values
    age = mixing.powers(query - past_length + 1 + mixing.window, wide)
    sums = sums + (before if age is None else before * age.unsqueeze(-1))
    rings = [next_ring(x, held, past_length, tokens, 0) for x in (k, v)]
    after = _state_after(mixing, keys, values, padding, key, past_length + tokens)
    old = state.to(wide.dtype)
    if mixing.decay is not None:
        old = old * mixing.decay.to(wide.dtype).view(-1, 1, 1) ** tokens
    return mixing.divided(sums, v.dtype), rings[0], rings[1], (old + after).to(state.dtype)


def _check(mixing: Mixing) -> None:
    if mixing.window and not mixing.causal:
        raise ValueError("a window of softmax needs causal=True: far keys are those before it")
    if mixing.decay is not None and not mixing.causal:
        raise ValueError("a decay needs causal=True: it counts the tokens from key to query")


def key_weights(
    q: Tensor,
    k: Tensor,
    mixing: Mixing,
    distance: Tensor,
    padding: Tensor | None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the weight of each key for each query (B, H, T, S), from how far it is behind.

    The second result is what a state gives to each query, (B, H, T, E + 1).
    """
    near: Tensor | None = None
    top: Tensor | None = None
    if mixing.window:
        shown = (distance >= 0) & (distance < mixing.window)
        shown = shown if padding is None else shown & padding
        scores = (mixing.scaled(q) @ k.transpose(-1, -2)).masked_fill(~shown, -torch.inf)
        near, top = mixing.near(scores)
    of_query = mixing.of_queries(q, top)
    far = of_query @ mixing.of_keys(k, padding).transpose(-1, -2)
    given = None if state is None else of_query @ state.to(q.dtype)
    if not mixing.causal:
        return far, given
    age = mixing.powers(distance.clamp(min=0), q)
    far = (far if age is None else far * age).masked_fill(distance < mixing.window, 0.0)
    return (far if near is None else near + far), given


def _state_after(
    mixing: Mixing, k: Tensor, v: Tensor, padding: Tensor, key: Tensor, seen: Any
) -> Tensor:
    """Return what the keys at these positions add to the state once so many tokens were seen."""
    age = seen - 1 - mixing.window - key
    left = padding & (age >= 0)
    found = mixing.of_keys(k, left)
    weight = mixing.powers(age.clamp(min=0), k)
    if weight is not None:
        found = found * weight.unsqueeze(-1)
    return found.transpose(-1, -2) @ v


def _per_query_head(x: Tensor, heads: int, head_map: Sequence[int] | None) -> Tensor:
    if head_map is not None:
        return x[:, list(head_map)]
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


_SETTINGS = (
    "str feature='hedgehog', int window=0, {causal}bool normalize=True, float least=1e-06, "
    "Tensor? padding=None, float? scale=None, int[]? k_map=None, int[]? v_map=None"
)
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? map_q=None, Tensor? map_k=None, "
    "Tensor? gate=None, Tensor? decay=None, *, "
    f"{_SETTINGS.format(causal='bool causal=False, ')}) -> Tensor"
)
_LIBRARY.define(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? map_q, Tensor? map_k, "
    "Tensor? gate, Tensor? decay, Tensor past_k, Tensor past_v, Tensor state, "
    f"SymInt past_length, *, {_SETTINGS.format(causal='')}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("linear_attention", linear_attention_reference, "CompositeImplicitAutograd")
_LIBRARY.impl("linear_attention_step", linear_attention_step_reference, "CompositeImplicitAutograd")

linear_attention = torch.ops.attnopt.linear_attention.default
linear_attention_step = torch.ops.attnopt.linear_attention_step.default
