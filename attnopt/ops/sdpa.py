"""The canonical attention by way of scaled_dot_product_attention: the fast copy of the reference.

Masks are chosen by the sizes of a call. One query needs no structure, only the keys that it sees;
as many queries as keys need the kernel's own causal mode; the rest gets a narrow mask, made once
per forward, for each block of queries and the keys that the block can see. What the kernel cannot
say (a soft cap, sinks) runs by the reference.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.attention import MAPS_SCHEMA, STRUCTURE_SCHEMA, attention_reference
from attnopt.ops.bands import bands, by_bands
from attnopt.ops.hidden import Hidden, Keys, Structure, kernel, remembered, whole_mask
from attnopt.ops.hidden import Memo as Memo
from attnopt.ops.options import Options


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
    if torch.compiler.is_compiling() and _has_bands(q, options):
        # Bands are a loop over sizes, which a compiled graph calls and does not hold.
        found: Tensor = torch.ops.attnopt.banded_attention(q, k, v, **options)
        return found
    return _attended(q, k, v, memo, **options)


def _has_bands(q: Tensor, options: Mapping[str, Any]) -> bool:
    others = any(options.get(name) is not None for name in ("bias", "sinks", "softcap"))
    return options.get("window") is not None and not others and q.shape[2] != 1


def _attended(q: Tensor, k: Tensor, v: Tensor, memo: Memo | None, **options: Any) -> Tensor:
    given = Options.read(options)
    if given.sinks is not None or given.softcap is not None:
        return attention_reference(q, k, v, **options)[0]
    k, v = _in_groups(q, *given.heads_of(k, v))
    structure = Structure(**given.structure).needed(q.shape[2], k.shape[2])
    hidden = Hidden(structure, given.padding, given.mask, given.bias)
    found = _attend(q, k, v, hidden, given.scale, memo)
    return _mean_of_blind(found, q, k, v, hidden, memo) if given.mean_if_blind else found


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None
) -> Tensor:
    """Choose how a call's masks are said to the kernel; a blind query gives zeros."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        seen = Keys.of(hidden.structure, hidden.structure.first_key(keys - 1), keys)
        if seen.count < keys:
            k, v = seen.of_tensor(k, 2), seen.of_tensor(v, 2)
            hidden = hidden.part(slice(None), seen)
        return _one_query(q, k, v, hidden, scale, memo)
    if hidden.is_structure and hidden.structure.is_plain:
        if not hidden.structure.causal:
            return kernel(q, k, v, None, scale)
        if queries == keys:
            return kernel(q, k, v, None, scale, True)
    if memo is None or torch.compiler.is_compiling():
        return kernel(q, k, v, whole_mask(q, queries, keys, hidden), scale)
    cut = bands(queries, keys, hidden)
    if cut is not None:
        return by_bands(q, k, v, hidden, scale, memo, cut)
    made = remembered(memo, q, k, hidden, lambda: whole_mask(q, queries, keys, hidden))
    return kernel(q, k, v, made, scale)


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
    q: Tensor, k: Tensor, v: Tensor, hidden: Hidden, scale: float | None, memo: Memo | None
) -> Tensor:
    """Attend with one query, which sees every key that is left."""
    free = replace(hidden, structure=Structure())
    if free.is_structure:
        return kernel(q, k, v, None, scale)
    made = remembered(memo, q, k, free, lambda: whole_mask(q, 1, k.shape[2], free))
    return kernel(q, k, v, made, scale)


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attend by bands; the result always lies in memory as (B, T, H, E)."""
    found = _attended(q, k, v, {}, padding=padding, mask=mask, **options)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


def _shaped(q: Tensor, k: Tensor, v: Tensor, *masks: Any, **options: Any) -> Tensor:
    batch, heads, queries, _ = q.shape
    return v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gradients(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Attend once more, and take the gradients of that."""
    *tensors, padding, mask = context.saved_tensors
    with torch.enable_grad():
        own = [x.detach().requires_grad_() for x in tensors]
        found = _attended(own[0], own[1], own[2], {}, padding=padding, mask=mask, **context.options)
        return *torch.autograd.grad(found, own, gradient), None, None


_NAME = "attnopt::banded_attention"
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "banded_attention(Tensor q, Tensor k, Tensor v, Tensor? padding=None, Tensor? mask=None, *, "
    f"float? scale=None, bool mean_if_blind=False, {STRUCTURE_SCHEMA}, {MAPS_SCHEMA}) -> Tensor"
)
_LIBRARY.impl("banded_attention", _banded, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _shaped, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradients, setup_context=_save, lib=_LIBRARY)
