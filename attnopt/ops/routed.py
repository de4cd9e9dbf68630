"""Attention of which each token uses some heads only: its output, times the gates of its tokens.

A gate of zero says that a token does not use a head: the output is zero there, whatever the
attention would have given, no gradient comes back, and nothing needs to be computed. Axis letters
and options as in `attnopt.ops.attention`.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops.attention import OPTIONS_SCHEMA, attention_reference


def routed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: Any
) -> Tensor:
    """Return the gated output (B, H, T, E); gates are (B or 1, H or 1, T or 1)."""
    return gated(attention_reference(q, k, v, **options)[0], gates)


def gated(found: Tensor, gates: Tensor) -> Tensor:
    """Multiply an output by its gates; what is off is zero, even where it is not finite."""
    shares = gates.unsqueeze(-1).to(found.dtype)
    return torch.where(shares != 0, found * shares, 0.0)


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    f"routed_attention(Tensor q, Tensor k, Tensor v, Tensor gates, *, {OPTIONS_SCHEMA}) -> Tensor"
)
_LIBRARY.impl("routed_attention", routed_attention_reference, "CompositeImplicitAutograd")

routed_attention = torch.ops.attnopt.routed_attention.default
