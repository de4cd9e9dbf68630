"""Attention over a cache that grows: the past, then new keys and values, returned together.

Options as in `attnopt.ops.attention`. Of the past, the first `past_length` tokens count.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.attention import OPTIONS_SCHEMA, attention_reference


def cached_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_length: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, T, E), and keys and values (B, Hk, past_length + T, D or E)."""
    keys = torch.cat([past_k[:, :, :past_length], k], dim=2)
    values = torch.cat([past_v[:, :, :past_length], v], dim=2)
    return attention_reference(q, keys, values, **options)[0], keys, values


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, "
    f"SymInt past_length, *, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("cached_attention", cached_attention_reference, "CompositeImplicitAutograd")

cached_attention = torch.ops.attnopt.cached_attention.default
