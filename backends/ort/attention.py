"""The canonical attention in the ops of every ONNX opset: two products around a softmax.

Axis letters as in `attnopt.ops.attention`; G query heads share a key head. A mask is added as
numbers and made once for all layers of the same sizes. Queries sit at the end of the keys, which
the `is_causal` of the standard op does not say where keys of the past are concatenated.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnopt.ops.options import Options
from attnopt.ops.structure import visible_keys

Memo = dict[Hashable, tuple[Any, ...]]
# Any score added to it vanishes.
HIDDEN = -1e30


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memo: Memo,
    **options: Any,
) -> Tensor:
    """Return what `attention_reference` returns first; `memo` keeps masks for later layers."""
    given = Options.read(options)
    k, v = given.heads_of(k, v)
    scale = q.shape[-1] ** -0.5 if given.scale is None else given.scale
    scores = _grouped(q, k.transpose(-1, -2)) * scale
    if given.softcap is not None:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    if given.bias is not None:
        scores = scores + given.bias
    hidden, sees = hidden_keys(q, k.shape[2], memo, given)
    if hidden is not None:
        scores = scores + hidden
    return blind_as_zeros(_grouped(_weights(scores, given.sinks), v), sees, given)


def blind_as_zeros(found: Tensor, sees: Tensor | None, given: Options) -> Tensor:
    """Return a result as the call wants it for blind queries.

    The least number hides all keys alike, so that they give the mean as it is.
    """
    return found if sees is None or given.mean_if_blind else torch.where(sees, found, 0.0)


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """Multiply (B, H, T, N) by (B, H / G, N, M), whose heads are not repeated for it."""
    batch, heads, tokens, width = x.shape
    if heads == y.shape[1]:
        return x @ y
    rows = x.reshape(batch, y.shape[1], heads // y.shape[1] * tokens, width)
    return (rows @ y).reshape(batch, heads, tokens, y.shape[-1])


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def hidden_keys(
    q: Tensor, keys: Any, memo: Memo, given: Options
) -> tuple[Tensor | None, Tensor | None]:
    """Return what to add to the scores, and which queries see a key at all (None: each does)."""
    queries, structure, masks = q.shape[2], given.structure, (given.padding, given.mask)
    key = (str(queries), str(keys), q.dtype, *sorted(structure.items()), *map(id, masks))
    if key not in memo:
        seen = visible_keys(queries, keys, **structure, device=q.device)
        for more in masks:
            if more is not None:
                seen = more if seen is None else seen & more
        # The masks are kept with it, so that none of their numbers can be another tensor's.
        memo[key] = (*_as_numbers(seen, q.dtype, some=any(m is not None for m in masks)), masks)
    hidden, sees, _ = memo[key]
    return hidden, sees


def _as_numbers(
    seen: Tensor | None, dtype: torch.dtype, *, some: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return a mask to add; its least number is finite, so that a row of it gives no NaN.

    It is not the dtype's least: for a row of that, ONNX Runtime's Attention gives zeros.
    """
    if seen is None:
        return None, None
    least = torch.full((), HIDDEN, dtype=dtype, device=seen.device)
    hidden = torch.where(seen, torch.zeros_like(least), least)
    return hidden, seen.any(dim=-1, keepdim=True) if some else None
