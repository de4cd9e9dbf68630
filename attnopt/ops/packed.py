"""Routed attention that computes what is on and no more: the fast copy of the reference.

For each key head the queries of its group that are on become rows, packed in the order of their
tokens; a tile of rows sees the keys up to its last token, and a key head without rows is not read.
Under causality what all rows of a tile see needs no mask, so that only the rest has one, and both
are joined by their log-sum-exps. Where most heads are on, or little is there to be saved, one dense
call comes first and the gates after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.hidden import Structure, kernel
from attnopt.ops.options import Options
from attnopt.ops.routed import gated, routed_attention_reference
from attnopt.ops.sdpa import Memo, attend
from attnopt.ops.sealed import Sealed
from attnopt.ops.structure import visible_at

# Rows of a tile.
_TILE: Final = 256
# From this share of all rows on, dense attention is as fast.
_DENSE: Final = 0.8
# Pairs of a query and a key below which calls cost more than what they leave out: of one head, and
# of all heads where there is one query.
_SMALL, _SMALL_STEP = 2**16, 2**14
# Keys before a tile's first token that are worth a call without a mask.
_PREFIX: Final = 128

_with_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Way:
    """How a call is carried out, and why."""

    name: Literal["dense", "packed"]
    why: str


def attend_routed(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, memo: Memo | None = None, **options: Any
) -> Tensor:
    """Return what `routed_attention_reference` returns.

    Without a memo, as in a graph to be compiled, one op hides the loops that depend on the gates.
    """
    if torch.compiler.is_exporting():
        return routed_attention_reference(q, k, v, gates, **options)
    if memo is None or torch.compiler.is_compiling():
        found: Tensor = routed_attention_fast(*SEALED.arguments(q, k, v, gates, **options))
        return found
    given = Options.read({n: x for n, x in options.items() if x is not None})
    if way(q, k, gates, given).name == "dense":
        return gated(attend(q, k, v, memo, **options), gates)
    return by_rows(q, k, v, gates.expand(q.shape[:3]), given)


def way(q: Tensor, k: Tensor, gates: Tensor, given: Options) -> Way:
    """Choose how to carry out a call."""
    _, heads, queries, _ = q.shape
    pairs = queries * k.shape[2]
    if given.softcap is not None or given.sinks is not None:
        return Way("dense", "no kernel knows a soft cap or sinks")
    if heads * pairs < _SMALL_STEP if queries == 1 else pairs <= _SMALL:
        return Way("dense", f"{pairs:,} pairs a head: one call is faster than several")
    share = float((gates != 0).float().mean())
    if share >= _DENSE:
        return Way("dense", f"{share:.0%} of the rows are on")
    return Way("packed", f"{share:.0%} of the rows are on")


def by_rows(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, given: Options) -> Tensor:
    """Attend with the rows that are on; the result lies in memory as (B, T, H, E)."""
    k, v = _in_groups(q, *given.heads_of(k, v))
    group = q.shape[1] // k.shape[1]
    on = (gates != 0).unflatten(1, (-1, group)).transpose(2, 3)
    row, key_head, token, member = on.nonzero(as_tuple=True)
    head = key_head * group + member
    queries = q[row, head, token]
    ends = on.sum((2, 3)).flatten().cumsum(0).tolist()
    parts: list[Tensor] = []
    for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        if stop > start:
            call = _Call.of(q, k, v, given, *divmod(number, k.shape[1]))
            parts += call.attended(queries[start:stop], token[start:stop], head[start:stop])
    found = v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    if parts:
        shares = gates[row, head, token].unsqueeze(-1).to(v.dtype)
        found = found.index_put((row, token, head), torch.cat(parts) * shares)
    return found.transpose(1, 2)


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give keys and values equally many heads."""
    if k.shape[1] == v.shape[1]:
        return k, v
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return k, v


@dataclass(frozen=True)
class _Call:
    """The keys (S, D) and values (S, E) of one head, and what hides them from queries.

    `seen` counts, for each token, the keys that it sees, the first ones, where no more than that is
    hidden; None otherwise. `values` are those of all keys.
    """

    k: Tensor
    v: Tensor
    values: Tensor
    given: Options
    row: int
    before: int
    seen: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, given: Options, row: int, key_head: int
    ) -> "_Call":
        """Take the keys of a row of the batch, without padding where nothing else hides any."""
        tokens, keys = q.shape[2], k.shape[2]
        values = v[row, key_head]
        whole = cls(k[row, key_head], values, values, given, row, keys - tokens)
        structure = Structure(**given.structure).needed(tokens, keys)
        if not structure.is_plain or given.mask is not None or given.bias is not None:
            return whole
        place = torch.arange(tokens, device=q.device) + whole.before
        seen = (place + 1).clamp(min=0) if structure.causal else torch.full_like(place, keys)
        if given.padding is None:
            return replace(whole, seen=seen)
        real = given.padding[row if given.padding.shape[0] > 1 else 0, 0, 0]
        counts = F.pad(real.long().cumsum(0), (1, 0))
        held = real.nonzero().squeeze(1)
        return replace(whole, k=whole.k[held], v=whole.v[held], seen=counts[seen])

    def attended(self, queries: Tensor, token: Tensor, head: Tensor) -> Iterator[Tensor]:
        """Yield the results of the rows, tile by tile."""
        for rows in zip(*(x.split(_TILE) for x in (queries, token, head)), strict=True):
            if self.seen is None:
                yield self._masked(*rows)
            else:
                yield self._first(rows[0], self.seen[rows[1]])

    def _first(self, queries: Tensor, seen: Tensor) -> Tensor:
        """Attend with rows that see the first so many keys, never fewer than the row before."""
        least, most = int(seen[0]), int(seen[-1])
        if most == 0:
            return self._blind(queries.new_zeros(len(queries), self.v.shape[1]), seen == 0)
        if least == most:
            return self._call(queries, 0, most, None)
        # A row of a stretch must see a key of it, or its log-sum-exp is none.
        start = least - 1 if least > _PREFIX and self._joins(queries) else 0
        column = torch.arange(start, most, device=queries.device)
        mask = torch.zeros(len(seen), most - start, dtype=queries.dtype, device=queries.device)
        mask = mask.masked_fill_(column >= seen.unsqueeze(1), -torch.inf)
        if start:
            return self._joined(queries, start, most, mask)
        return self._blind(self._call(queries, 0, most, mask), seen == 0)

    def _joins(self, queries: Tensor) -> bool:
        """Tell whether a kernel gives log-sum-exps; they have no gradient."""
        learns = any(x.requires_grad for x in (queries, self.k, self.v))
        same = self.k.shape[1] == self.v.shape[1]
        return queries.device.type == "cpu" and same and not (learns and torch.is_grad_enabled())

    def _joined(self, queries: Tensor, start: int, stop: int, mask: Tensor) -> Tensor:
        """Join what is before a stretch, which all rows see, and the stretch itself."""
        found: list[tuple[Tensor, Tensor]] = []
        for part, hidden in ((slice(0, start), None), (slice(start, stop), mask)):
            operands = (x[None, None] for x in (queries, self.k[part], self.v[part]))
            found.append(_with_lse(*operands, 0.0, False, attn_mask=hidden, scale=self.given.scale))
        (one, one_lse), (other, other_lse) = found
        share = torch.sigmoid(one_lse - other_lse).unsqueeze(-1).to(one.dtype)
        return torch.lerp(other, one, share)[0, 0]

    def _masked(self, queries: Tensor, token: Tensor, head: Tensor) -> Tensor:
        """Attend with rows under whatever hides keys from them."""
        given, structure = self.given, Structure(**self.given.structure)
        first, last = (int(token[n]) + self.before for n in (0, -1))
        start = 0 if structure.first or structure.prefix else structure.first_key(first)
        ends = structure.ends and structure.prefix is None
        stop = min(len(self.k), max(last + 1, start + 1)) if ends else len(self.k)
        column = torch.arange(start, stop, device=queries.device)
        seen = visible_at((token + self.before).unsqueeze(1), column, **given.structure)
        for more in (given.padding, given.mask):
            if more is not None:
                own = self._of_rows(more, token, head, start, stop)
                seen = own if seen is None else seen & own
        mask = torch.zeros(len(queries), stop - start, dtype=queries.dtype, device=queries.device)
        if given.bias is not None:
            mask = mask + self._of_rows(given.bias, token, head, start, stop).to(mask.dtype)
        if seen is None:
            return self._call(queries, start, stop, mask)
        seen = seen.expand_as(mask)
        found = self._call(queries, start, stop, mask.masked_fill(~seen, -torch.inf))
        return self._blind(found, ~seen.any(-1))

    def _of_rows(self, x: Tensor, token: Tensor, head: Tensor, start: int, stop: int) -> Tensor:
        """Return what a tensor that broadcasts to (B, H, T, S) says of some rows, (rows, keys)."""
        x = x[(None,) * (4 - x.dim())]
        x = x[self.row if x.shape[0] > 1 else 0]
        x = x[head if x.shape[0] > 1 else 0, token if x.shape[1] > 1 else 0]
        return x if x.shape[-1] == 1 else x[..., start:stop]

    def _call(self, queries: Tensor, start: int, stop: int, mask: Tensor | None) -> Tensor:
        operands = (queries, self.k[start:stop], self.v[start:stop])
        q, k, v = (x[None, None] for x in operands)
        return kernel(q, k, v, mask, self.given.scale)[0, 0]

    def _blind(self, found: Tensor, blind: Tensor) -> Tensor:
        """Put the mean of all values where a query sees no key and the call wants it."""
        if not self.given.mean_if_blind or not bool(blind.any()):
            return found
        return torch.where(blind.unsqueeze(1), self.values.mean(0), found)


def _attended(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: Any) -> Tensor:
    return attend_routed(q, k, v, gates, memo={}, **options)


SEALED: Final = Sealed(
    "routed_attention_fast",
    (
        "Tensor q", "Tensor k", "Tensor v", "Tensor gates", "Tensor? bias", "Tensor? mask",
        "Tensor? padding", "Tensor? sinks",
    ),
    "float? scale, float? softcap, bool mean_if_blind, bool causal, int? window, int? right, "
    "int? prefix, int? chunk, int? first, int[]? k_map, int[]? v_map",
    ("q", "k", "v", "gates", "bias", "sinks"),
    _attended,
)  # fmt: skip
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
routed_attention_fast, routed_attention_fast_backward = SEALED.define(_LIBRARY)
