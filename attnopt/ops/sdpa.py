"""The canonical attention by way of scaled_dot_product_attention: the fast copy of the reference.

Masks are chosen by the sizes of a call. One query needs no structure, only the keys that it sees;
as many queries as keys need the kernel's own causal mode; the rest gets a narrow mask, made once
per forward, for each block of queries and the keys that the block can see. What that kernel cannot
say (a soft cap, sinks) `attnopt.ops.kernels` gives to others.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.attention import attention_reference
from attnopt.ops.bands import bands, by_bands, by_mask, worth_reading
from attnopt.ops.hidden import Hidden, Keys, Structure, remembered, whole_mask
from attnopt.ops.hidden import Memo as Memo
from attnopt.ops.kernels import FEWEST, Scoring, has_few_pairs, kernel
from attnopt.ops.options import Options
from attnopt.ops.sealed import Sealed

# Pairs of queries and keys up to which a compiled graph masks all scores, for less than it costs to
# call a loop over blocks; and up to which it makes them itself, fused with what changes them.
_FEW: Final = 2**14
_FEW_CHANGED: Final = 2**16


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what `attention_reference` returns first; `memo` keeps masks for later layers.

    Without a memo, as in a graph to be compiled, no loop depends on the sizes.
    """
    otherwise = _scores_otherwise(options)
    if torch.compiler.is_exporting():
        inlined = otherwise
    else:
        # Values of another width get no kernel: their scores are made in the graph anyhow.
        most = _FEW_CHANGED if otherwise else FEWEST if q.shape[-1] == v.shape[-1] else 0
        inlined = torch.compiler.is_compiling() and has_few_pairs(q, k, most)
    if inlined:
        return attention_reference(q, k, v, **options)[0]
    if torch.compiler.is_compiling() and _is_sealed(q, k, v, options):
        # Blocks are a loop over sizes, which a compiled graph calls and does not hold.
        found: Tensor = banded_attention(*SEALED.arguments(q, k, v, **options))
        return found
    return _attended(q, k, v, memo, **options)


def _scores_otherwise(options: Mapping[str, Any]) -> bool:
    """Tell whether scores are capped, or sinks join them."""
    return options.get("sinks") is not None or options.get("softcap") is not None


def _is_sealed(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> bool:
    """Tell whether a call of a compiled graph goes block by block."""
    if q.shape[2] == 1 or torch.compiler.is_exporting():
        return False
    if _scores_otherwise(options):
        return True
    if has_few_pairs(q, k, _FEW):
        return False
    bias = options.get("bias")
    named = any(options.get(name) is not None for name in ("window", "chunk", "prefix"))
    if named and bias is None:
        return True
    # The gradient of a sealed op attends once more: not where nothing may be skipped.
    given = (q, k, v, *(() if bias is None else (bias,)))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    masks = options.get("mask") is not None or bias is not None
    return masks and not learns and worth_reading(q, k)


def _attended(q: Tensor, k: Tensor, v: Tensor, memo: Memo | None = None, **options: Any) -> Tensor:
    given = Options.read(options)
    k, v = _in_groups(q, *given.heads_of(k, v))
    structure = Structure(**given.structure).needed(q.shape[2], k.shape[2])
    hidden = Hidden(structure, given.padding, given.mask, given.bias)
    found = _attend(q, k, v, hidden, Scoring(given.scale, given.softcap, given.sinks), memo)
    means = given.mean_if_blind and given.sinks is None
    return _mean_of_blind(found, q, k, v, hidden, memo) if means else found


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scoring: Scoring, memo: Memo | None
) -> Tensor:
    """Choose how a call's masks are said to the kernel; a blind query gives zeros."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        seen = Keys.of(hidden.structure, hidden.structure.first_key(keys - 1), keys)
        if seen.count < keys:
            k, v = seen.of_tensor(k, 2), seen.of_tensor(v, 2)
            hidden = hidden.part(slice(None), seen)
        return _one_query(q, k, v, hidden, scoring, memo)
    if hidden.is_structure and hidden.structure.is_plain:
        if not hidden.structure.causal:
            return kernel(q, k, v, None, scoring)
        if queries == keys:
            return kernel(q, k, v, None, scoring, True)
    if memo is None or torch.compiler.is_compiling():
        return kernel(q, k, v, whole_mask(q, queries, keys, hidden), scoring)
    if hidden.mask is not None or hidden.bias is not None:
        found = by_mask(q, k, v, hidden, scoring, memo)
        if found is not None:
            return found
    cut = bands(queries, keys, hidden)
    if cut is not None:
        return by_bands(q, k, v, hidden, scoring, memo, cut)
    made = remembered(memo, q, k, hidden, lambda: whole_mask(q, queries, keys, hidden))
    return kernel(q, k, v, made, scoring)


def _mean_of_blind(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, memo: Memo | None
) -> Tensor:
    """Put the mean of the values where a query sees no key."""
    if hidden.padding is None and hidden.mask is None and q.shape[2] <= k.shape[2]:
        # Each query sees its own key at least.
        return found
    sees = remembered(memo, q, k, hidden, lambda: _sees(q, k, hidden, memo), "sees")
    if sees is None:
        return found
    mean = _repeated(v.mean(dim=2, keepdim=True), q.shape[1])
    return torch.where(sees, found, mean)


def _sees(q: Tensor, k: Tensor, hidden: Hidden, memo: Memo | None) -> Tensor | None:
    """Return which queries see a key, as (B, 1, T, 1) or so; None where each is known to."""
    queries, keys = q.shape[2], k.shape[2]
    structure, padding = hidden.structure, hidden.padding
    if hidden.mask is not None:
        seen = structure.mask(queries, keys, q.device)
        for more in (padding, hidden.mask):
            if more is not None:
                seen = more if seen is None else seen & more
        assert seen is not None
        sees = seen.any(dim=-1, keepdim=True)
    else:
        start, stop = structure.range(queries, keys, q.device)
        if padding is None:
            sees = (stop > start).unsqueeze(-1)
        else:
            before = F.pad(padding.long().cumsum(-1), (1, 0))
            seen = before[..., stop] - before[..., start]
            if structure.first is not None:
                seen = seen + before[..., stop.clamp(max=structure.first)]
            sees = (seen > 0).transpose(-1, -2)
    known = memo is not None and not torch.compiler.is_compiling()
    return None if known and bool(sees.all()) else sees


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give keys and values equally many heads, in groups that the kernel knows."""
    if k.shape[1] == v.shape[1]:
        return k, v
    most = max(k.shape[1], v.shape[1])
    if most % min(k.shape[1], v.shape[1]):
        most = q.shape[1]
    return _repeated(k, most), _repeated(v, most)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scoring: Scoring, memo: Memo | None
) -> Tensor:
    """Attend with one query, which sees every key that is left."""
    free = replace(hidden, structure=Structure())
    if free.is_structure:
        return kernel(q, k, v, None, scoring)
    made = remembered(memo, q, k, free, lambda: whole_mask(q, 1, k.shape[2], free))
    return kernel(q, k, v, made, scoring)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return _attended(q, k, v, {}, **options)


SEALED: Final = Sealed(
    "banded_attention",
    (
        "Tensor q", "Tensor k", "Tensor v", "Tensor? bias", "Tensor? mask", "Tensor? padding",
        "Tensor? sinks",
    ),
    "float? scale, float? softcap, bool mean_if_blind, bool causal, int? window, int? right, "
    "int? prefix, int? chunk, int? first, int[]? k_map, int[]? v_map",
    ("q", "k", "v", "bias", "sinks"),
    _by_blocks,
    by_token=True,
)  # fmt: skip
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
banded_attention, banded_attention_backward = SEALED.define(_LIBRARY)
