"""The canonical attention op: softmax(cap(q k^T * scale) + bias, masked, with sinks) v.

Axis letters: B batch, H query heads, T queries, S keys, D channels of q and k, E channels of v.
Scores are scaled, then capped (c tanh(x / c)), then biased, then masked; a learned sink is a logit
of each head that joins the denominator only. Query head h reads key head `k_map[h]`, or h // (H /
Hk) without a map; values likewise. With `causal` or `window` a query sits at position t + S - T.
A row that sees no key is blind: it gives zeros, or with `mean_if_blind` the mean of all values, as
sources do that hide with a finite number; its log-sum-exp is minus infinity. With sinks it gives
zeros either way.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.structure import visible_keys

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mean_if_blind: bool = False,
    causal: bool = False,
    window: int | None = None,
    right: int | None = None,
    prefix: int | None = None,
    chunk: int | None = None,
    first: int | None = None,
    k_map: list[int] | None = None,
    v_map: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, T, E) and the natural log-sum-exp (B, H, T) of attention.

    `bias` and `mask` (true = visible) broadcast to (B, H, T, S), `padding` (true = visible) is
    (B, 1, 1, S); `sinks` has one logit a head.
    """
    dtype = torch.float32 if q.dtype in _LOW_PRECISION else q.dtype
    heads = q.shape[1]
    q_BHTD = q.to(dtype)
    k_BHSD = _per_query_head(k.to(dtype), heads, k_map)
    v_BHSE = _per_query_head(v.to(dtype), heads, v_map)
    scores = (q_BHTD @ k_BHSD.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    structure = visible_keys(
        *scores.shape[-2:], causal=causal, window=window, right=right, prefix=prefix, chunk=chunk,
        first=first, device=scores.device,
    )  # fmt: skip
    for visible in (structure, padding, mask):
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    lse = top.squeeze(-1) + torch.log(total.squeeze(-1))
    if sinks is not None:
        total = total + torch.exp(sinks.to(dtype).view(1, heads, 1, 1) - top)
    seen = total > 0
    weights = weights / torch.where(seen, total, torch.ones_like(total))
    if mean_if_blind:
        weights = torch.where(seen, weights, 1.0 / scores.shape[-1])
    return (weights @ v_BHSE).to(v.dtype), lse


def _per_query_head(x: Tensor, heads: int, head_map: list[int] | None) -> Tensor:
    """Repeat key or value heads so that each query head has its own."""
    if head_map is not None:
        return x[:, list(head_map)]
    if x.shape[1] == heads or x.shape[1] == 1:
        return x
    return x.repeat_interleave(heads // x.shape[1], dim=1)


_SIDES_SCHEMA = (
    "Tensor? bias=None, Tensor? mask=None, Tensor? padding=None, Tensor? sinks=None, "
    "float? scale=None, float? softcap=None, bool mean_if_blind=False"
)
STRUCTURE_SCHEMA = (
    "bool causal=False, int? window=None, int? right=None, int? prefix=None, int? chunk=None, "
    "int? first=None"
)
MAPS_SCHEMA = "int[]? k_map=None, int[]? v_map=None"
OPTIONS_SCHEMA = f"{_SIDES_SCHEMA}, {STRUCTURE_SCHEMA}, {MAPS_SCHEMA}"
UNSTRUCTURED_SCHEMA = f"{_SIDES_SCHEMA}, {MAPS_SCHEMA}"


def _forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention_reference(q, k, v, **options)[0]


# Composite: autograd, fake tensors and every device follow from the reference itself.
_LIBRARY = torch.library.Library("attnopt", "DEF")
_TAKES = f"(Tensor q, Tensor k, Tensor v, *, {OPTIONS_SCHEMA})"
_LIBRARY.define(f"attention{_TAKES} -> Tensor")
_LIBRARY.define(f"attention_lse{_TAKES} -> (Tensor, Tensor)")
_LIBRARY.impl("attention", _forward, "CompositeImplicitAutograd")
_LIBRARY.impl("attention_lse", attention_reference, "CompositeImplicitAutograd")

attention = torch.ops.attnopt.attention.default
attention_lse = torch.ops.attnopt.attention_lse.default
