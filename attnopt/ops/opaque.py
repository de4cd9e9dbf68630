"""Attention by a plan as one op, which a compiler does not look into."""

from typing import Any, Final

import torch
from torch import Tensor

from attnopt.ops.blockwise import by_plan
from attnopt.ops.sealed import Sealed

_OPTIONS: Final = (
    "int q_tile, int k_tile, float? scale, float? softcap, bool mean_if_blind, bool causal, "
    "int? window, int? right, int? prefix, int? chunk, int? first, int[]? k_map, int[]? v_map"
)


def call(q: Tensor, k: Tensor, v: Tensor, *plan: Tensor | None, **options: Any) -> Tensor:
    """Call the op with the arguments of the fast copy."""
    found: Tensor = block_attention_fast(*SEALED.arguments(q, k, v, *plan, **options))
    return found


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    index: Tensor,
    full_count: Tensor | None = None,
    full_index: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return by_plan(q, k, v, count, index, full_count, full_index, **options, memo={})


SEALED: Final = Sealed(
    "block_attention_fast",
    (
        "Tensor q", "Tensor k", "Tensor v", "Tensor count", "Tensor index", "Tensor? full_count",
        "Tensor? full_index", "Tensor? bias", "Tensor? mask", "Tensor? padding", "Tensor? sinks",
    ),
    _OPTIONS,
    ("q", "k", "v", "bias", "sinks"),
    _attended,
)  # fmt: skip
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
block_attention_fast, block_attention_fast_backward = SEALED.define(_LIBRARY)
