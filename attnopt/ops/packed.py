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

from attnopt.ops.hidden import Structure
from attnopt.ops.kernels import Scoring, kernel
from attnopt.ops.options import Options
from attnopt.ops.routed import gated, routed_attention_reference
from attnopt.ops.sdpa import Memo, attend
from attnopt.ops.sealed import Sealed
from attnopt.ops.structure import visible_at

# Rows of a tile; twice as many where a key head has rows for every token, which then lie closer.
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
    batch, heads, tokens, _ = q.shape
    k, v = _in_groups(q, *given.heads_of(k, v))
    group = heads // k.shape[1]
    on = (gates != 0).unflatten(1, (-1, group)).transpose(2, 3)
    row, key_head, token, member = on.nonzero(as_tuple=True)
    head = key_head * group + member
    place = (row * tokens + token) * heads + head
    rows = _Rows(_by_token(q), place, token, head)
    shares = _by_token(gates.unsqueeze(-1)).to(v.dtype)
    found = v.new_zeros(batch * tokens * heads, v.shape[3])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gates))
    parts: list[Tensor] = []
    start = 0
    for number, own in enumerate(on.sum((2, 3)).tolist()):
        mine = rows.part(start, sum(own))
        start += sum(own)
        for tile, part in _Keys.of(q, k, v, given, number).attended(mine, own) if sum(own) else ():
            if learns:
                parts.append(part)
                continue
            # What a tile gives goes where it belongs at once: memory is taken once and not thrice.
            part *= shares.index_select(0, tile.place)
            found.index_copy_(0, tile.place, part)
    if parts:
        found = found.index_copy(0, place, torch.cat(parts) * shares.index_select(0, place))
    return found.view(batch, tokens, heads, -1).transpose(1, 2)


def _by_token(x: Tensor) -> Tensor:
    """Return (B, H, T, D) as rows in the order of batch, tokens and heads."""
    return x.transpose(1, 2).reshape(-1, x.shape[3])


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give keys and values equally many heads."""
    if k.shape[1] == v.shape[1]:
        return k, v
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return k, v


@dataclass(frozen=True)
class _Rows:
    """Where queries that are on are among all of them, and which token and head each is of."""

    all: Tensor
    place: Tensor
    token: Tensor
    head: Tensor

    @property
    def queries(self) -> Tensor:
        """The queries that are on, (rows, D)."""
        return self.all.index_select(0, self.place)

    def part(self, start: int, count: int) -> "_Rows":
        """Return some of them."""
        cut = (x.narrow(0, start, count) for x in (self.place, self.token, self.head))
        return _Rows(self.all, *cut)


@dataclass(frozen=True)
class _Keys:
    """The keys and values of one row of the batch, (1, H, S, D), and what hides them from queries.

    `seen` counts, for each token, the keys that it sees, the first ones, where no more than that is
    hidden; None otherwise. `values` are those of all keys.
    """

    k: Tensor
    v: Tensor
    values: Tensor
    given: Options
    row: int
    tokens: int
    seen: Tensor | None = None

    @property
    def before(self) -> int:
        """How many keys there are before the first token's."""
        return self.values.shape[2] - self.tokens

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, given: Options, row: int) -> "_Keys":
        """Take the keys of a row of the batch, without padding where nothing else hides any."""
        tokens, keys = q.shape[2], k.shape[2]
        k, v = k[row : row + 1], v[row : row + 1]
        whole = cls(k, v, v, given, row, tokens)
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
        return replace(whole, k=k[:, :, held], v=v[:, :, held], seen=counts[seen])

    def attended(self, rows: _Rows, counts: list[int]) -> Iterator[tuple[_Rows, Tensor]]:
        """Yield rows, tile by tile, with their results; so many rows are of each key head."""
        tiles = list(_tiles(counts, self.tokens))
        if self.seen is None:
            for key_head, start, count in tiles:
                tile = rows.part(start, count)
                yield tile, self._masked(tile, key_head)
            return
        seen = self.seen[rows.token]
        edges = torch.tensor([[start, start + count - 1] for _, start, count in tiles])
        bounds = seen[edges.to(seen.device)].tolist()
        joins = _joins(rows.all, self.k, self.v)
        for (key_head, start, count), (least, most) in zip(tiles, bounds, strict=True):
            tile, own = rows.part(start, count), seen.narrow(0, start, count)
            q = tile.queries[None, None]
            yield tile, self._first(q, own, key_head, least, most, joins=joins)

    def _first(
        self, q: Tensor, seen: Tensor, key_head: int, least: int, most: int, *, joins: bool
    ) -> Tensor:
        """Attend with rows that see the first `least` to `most` keys, each as many as the last."""
        k, v = (x.narrow(1, key_head, 1).narrow(2, 0, most) for x in (self.k, self.v))
        if least == most:
            found = self._call(q, k, v, None) if most else q.new_zeros(*q.shape[:3], v.shape[3])
        elif joins and least - 1 > _PREFIX:
            # A row of a stretch must see a key of it, or its log-sum-exp is none.
            found = self._joined(q, k, v, seen, least - 1)
        else:
            found = self._call(q, k, v, _hiding(seen, 0, most, q))
        return found[0, 0] if least else self._blind(found[0, 0], seen == 0, key_head)

    def _joined(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, start: int) -> Tensor:
        """Join the keys before a stretch, which all rows see, and those of the stretch."""
        rest, scale = k.shape[2] - start, self.given.scale
        mask = _hiding(seen, start, k.shape[2], q)
        one, one_lse = _with_lse(q, k.narrow(2, 0, start), v.narrow(2, 0, start), scale=scale)
        other, other_lse = _with_lse(
            q, k.narrow(2, start, rest), v.narrow(2, start, rest), attn_mask=mask, scale=scale
        )
        share = torch.sigmoid(one_lse - other_lse).unsqueeze(-1).to(one.dtype)
        return torch.lerp(other, one, share)

    def _masked(self, rows: _Rows, key_head: int) -> Tensor:
        """Attend with rows under whatever hides keys from them."""
        given, structure, q = self.given, Structure(**self.given.structure), rows.queries
        first, last = (int(rows.token[n]) + self.before for n in (0, -1))
        start = 0 if structure.first or structure.prefix else structure.first_key(first)
        stop = self.k.shape[2]
        if structure.ends and structure.prefix is None:
            stop = min(stop, max(last, start) + 1)
        column = torch.arange(start, stop, device=q.device)
        seen = visible_at((rows.token + self.before).unsqueeze(1), column, **given.structure)
        for more in (given.padding, given.mask):
            if more is not None:
                own = self._of_rows(more, rows, start, stop)
                seen = own if seen is None else seen & own
        mask = q.new_zeros(len(q), stop - start)
        if given.bias is not None:
            mask = mask + self._of_rows(given.bias, rows, start, stop).to(mask.dtype)
        if seen is not None:
            mask = mask.masked_fill(~seen, -torch.inf)
        k, v = (x[:, key_head : key_head + 1, start:stop] for x in (self.k, self.v))
        found = self._call(q[None, None], k, v, mask)[0, 0]
        if seen is None:
            return found
        return self._blind(found, ~seen.expand_as(mask).any(-1), key_head)

    def _of_rows(self, x: Tensor, rows: _Rows, start: int, stop: int) -> Tensor:
        """Return what a tensor that broadcasts to (B, H, T, S) says of some rows, (rows, keys)."""
        x = x[(None,) * (4 - x.dim())]
        x = x[self.row if x.shape[0] > 1 else 0]
        x = x[rows.head if x.shape[0] > 1 else 0, rows.token if x.shape[1] > 1 else 0]
        return x if x.shape[-1] == 1 else x[..., start:stop]

    def _call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return kernel(q, k, v, mask, Scoring(self.given.scale))

    def _blind(self, found: Tensor, blind: Tensor, key_head: int) -> Tensor:
        """Put the mean of all values where a query sees no key and the call wants it."""
        if not self.given.mean_if_blind or not bool(blind.any()):
            return found
        return torch.where(blind.unsqueeze(1), self.values[0, key_head].mean(0), found)


def _tiles(counts: list[int], tokens: int) -> Iterator[tuple[int, int, int]]:
    """Cut the rows of each key head into tiles of about one size: (key head, start, count)."""
    start = 0
    for key_head, count in enumerate(counts):
        pieces = -(-count // (_TILE if count < tokens else 2 * _TILE))
        for number in range(pieces):
            first, last = (count * n // pieces for n in (number, number + 1))
            yield key_head, start + first, last - first
        start += count


def _joins(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether a kernel gives log-sum-exps; they have no gradient."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.device.type == "cpu" and k.shape[3] == v.shape[3] and not learns


def _hiding(seen: Tensor, start: int, stop: int, like: Tensor) -> Tensor:
    """Return a mask to add, (rows, stop - start), of rows that see the first so many keys.

    All rows are stretches of one vector, zeros before minus infinities, and copied from there.
    """
    keys = stop - start
    line = like.new_zeros(2 * keys)
    line[keys:] = -torch.inf
    return line.unfold(0, keys, 1).index_select(0, stop - seen)


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
