"""The rows of a plan, sorted by what they visit, and one attention call for rows that are alike.

A row is a tile of queries of one group of heads. Axis letters: B batch, P plan heads, U groups of
query heads with keys and a plan of their own, G heads of a group, I tiles of queries, J tiles of
keys, N rows (B, U, I), R rows of one call, n tiles that each of them visits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.options import Options
from attnopt.ops.sdpa import attend
from attnopt.ops.structure import visible_at
from attnopt.ops.tilewise import BY_END, BY_PADDING, BY_POSITION, BY_ROW, POSITION, Tilewise

# Numbers gathered for one call: what is gathered should still be in the cache when it is read.
_GATHERED = 2**22


@dataclass(frozen=True)
class Bucket:
    """Rows that visit as many tiles whole, and as many tiles cut in the same ways.

    `rows` are numbers (R,), `tiles` (R, n) what each visits, the whole tiles first.
    """

    rows: Tensor
    tiles: Tensor
    whole: int
    codes: tuple[int, ...]

    def chunks(self, numbers: int) -> Iterator["Bucket"]:
        """Yield parts of so few rows that what is gathered, `numbers` a tile, stays small."""
        most = max(1, _GATHERED // max(numbers * self.tiles.shape[1], 1))
        for rows, tiles in zip(self.rows.split(most), self.tiles.split(most), strict=True):
            yield Bucket(rows, tiles, self.whole, self.codes)


def by_rows(q: Tensor, k: Tensor, v: Tensor, plan: Tilewise, given: Options) -> Tensor:
    """Attend bucket by bucket."""
    operands = _Operands.of(q, *given.heads_of(k, v), plan, given)
    found: list[Tensor] = []
    rows: list[Tensor] = []
    for bucket in buckets(plan, operands.batch, operands.groups):
        for part in bucket.chunks(plan.k_tile * (k.shape[-1] + v.shape[-1])):
            found.append(operands.attended(part))
            rows.append(part.rows)
    return operands.restored(torch.cat(found), torch.cat(rows))


def buckets(plan: Tilewise, batch: int, groups: int) -> Iterator[Bucket]:
    """Sort the rows of a plan, each (batch, group, tile), by what they visit."""
    codes = plan.codes.expand(batch, *plan.codes.shape[1:])
    codes = codes.repeat_interleave(groups // codes.shape[1], dim=1).flatten(0, 2)
    order = torch.argsort(torch.where(codes < 0, 2, (codes > 0).long()), dim=-1, stable=True)
    whole, cut = (codes == 0).sum(-1), (codes > 0).sum(-1)
    most = int(cut.max())
    place = whole.unsqueeze(1) + torch.arange(most, device=codes.device)
    listed = order.gather(1, place.clamp(max=codes.shape[1] - 1))
    ways = codes.gather(1, listed).masked_fill(place >= (whole + cut).unsqueeze(1), -1)
    kinds, kind = torch.unique(
        torch.cat([whole.unsqueeze(1), ways], dim=1), dim=0, return_inverse=True
    )
    sizes = torch.bincount(kind, minlength=len(kinds)).tolist()
    rows = torch.argsort(kind, stable=True).split(sizes)
    for (first, *rest), members in zip(kinds.tolist(), rows, strict=True):
        same = tuple(code for code in rest if code >= 0)
        yield Bucket(members, order[members, : first + len(same)], first, same)


@dataclass(frozen=True)
class _Operands:
    """Queries by row (N, G, q_tile, D), and tiles of keys and values by number."""

    q: Tensor
    k: Tensor
    v: Tensor
    mean: Tensor | None
    plan: Tilewise
    given: Options
    batch: int
    groups: int
    heads: tuple[int, int]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: Tilewise, given: Options) -> "_Operands":
        """Cut the tensors of a call into tiles."""
        batch, heads = q.shape[:2]
        groups = math.lcm(plan.codes.shape[1], k.shape[1], v.shape[1])
        rows = _tiles(q, plan.q_tile).unflatten(1, (groups, heads // groups)).transpose(2, 3)
        mean = None
        if given.mean_if_blind:
            mean = v.mean(dim=2).repeat_interleave(heads // v.shape[1], dim=1)
            mean = mean.view(batch, groups, 1, heads // groups, 1, -1)
            mean = mean.expand(-1, -1, rows.shape[2], -1, -1, -1).flatten(0, 2)
        return cls(
            rows.flatten(0, 2),
            _tiles(k, plan.k_tile).flatten(0, 2),
            _tiles(v, plan.k_tile).flatten(0, 2),
            mean, plan, given, batch, groups, (k.shape[1], v.shape[1]),
        )  # fmt: skip

    def attended(self, bucket: Bucket) -> Tensor:
        """Return what the rows of a bucket see, (R, G, q_tile, E)."""
        q, given = self.q[bucket.rows], self.given
        count = len(bucket.rows)
        if not bucket.tiles.shape[1]:
            blank = self.v.new_zeros(*q.shape[:3], self.v.shape[-1])
            return blank if self.mean is None else blank + self.mean[bucket.rows]
        k, v = (
            x[self._numbers(bucket, heads)].view(count, 1, -1, x.shape[-1])
            for x, heads in zip((self.k, self.v), self.heads, strict=True)
        )
        mask, padding = self._mask(bucket), self._padding(bucket)
        found = attend(
            q, k, v, mask=mask, padding=padding, scale=given.scale, softcap=given.softcap
        )
        if self.mean is None or (mask is None and padding is None):
            return found
        seen = mask if padding is None else padding if mask is None else mask & padding
        assert seen is not None
        return torch.where(seen.any(-1, keepdim=True), found, self.mean[bucket.rows])

    def restored(self, found: Tensor, rows: Tensor) -> Tensor:
        """Bring results to the order of the rows and to (B, H, T, E)."""
        place = torch.empty_like(rows)
        place[rows] = torch.arange(len(rows), device=rows.device)
        tiles = len(rows) // (self.batch * self.groups)
        ordered: Tensor = found[place].unflatten(0, (self.batch, self.groups, tiles))
        return ordered.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, : self.plan.queries]

    def _numbers(self, bucket: Bucket, heads: int) -> Tensor:
        """Return the numbers of the tiles of a tensor with so many heads."""
        group = bucket.rows // self.plan.codes.shape[2]
        batch, own = group // self.groups, group % self.groups * heads // self.groups
        tiles = self.plan.codes.shape[3]
        return ((batch * heads + own) * tiles).unsqueeze(1) + bucket.tiles

    def _mask(self, bucket: Bucket) -> Tensor | None:
        """Return what the rows see of the tiles that they visit, (R or 1, 1, q_tile, n k_tile)."""
        plan = self.plan
        if not any(code & (BY_POSITION | BY_END | BY_ROW) for code in bucket.codes):
            return None
        device = bucket.rows.device
        whole = torch.ones(plan.q_tile, bucket.whole * plan.k_tile, dtype=torch.bool, device=device)
        cut = [_cut(plan, code, device) for code in bucket.codes]
        mask = torch.cat([whole, *cut], dim=1)[None, None]
        if plan.rows is None or not any(code & BY_ROW for code in bucket.codes):
            return mask
        each = plan.rows.expand(self.batch, *plan.rows.shape[1:])
        each = each.repeat_interleave(self.groups // each.shape[1], dim=1).flatten(0, 2)
        index = bucket.tiles.unsqueeze(1).expand(-1, plan.q_tile, -1)
        visits = each[bucket.rows].gather(2, index)
        return mask & visits.repeat_interleave(plan.k_tile, dim=-1).unsqueeze(1)

    def _padding(self, bucket: Bucket) -> Tensor | None:
        """Return the padding of the tiles that the rows visit, (R, 1, 1, n k_tile)."""
        plan = self.plan
        if plan.padding is None or not any(code & BY_PADDING for code in bucket.codes):
            return None
        shown = _tiles(plan.padding.transpose(-1, -2), plan.k_tile).flatten(0, 2).squeeze(-1)
        tiles = plan.codes.shape[3]
        batch = bucket.rows // (self.groups * plan.codes.shape[2])
        batch = batch if len(plan.padding) > 1 else torch.zeros_like(batch)
        return shown[(batch * tiles).unsqueeze(1) + bucket.tiles].flatten(1)[:, None, None]


def _cut(plan: Tilewise, code: int, device: torch.device) -> Tensor:
    """Return what is visible in a tile that is cut in the way of a code, (q_tile, k_tile)."""
    row = torch.arange(plan.q_tile, device=device).unsqueeze(1)
    column = torch.arange(plan.k_tile, device=device)
    seen = torch.ones(plan.q_tile, plan.k_tile, dtype=torch.bool, device=device)
    if code & BY_POSITION:
        within = visible_at(row + plan.distance(code // POSITION), column, **plan.shifts)
        seen = seen if within is None else seen & within
    if code & BY_END:
        seen = seen & (column < (plan.keys - 1) % plan.k_tile + 1)
    return seen


def _tiles(x: Tensor, tile: int) -> Tensor:
    """Cut (B, H, L, D) into (B, H, tiles, tile, D), the last one filled up with zeros."""
    more = -x.shape[2] % tile
    x = F.pad(x, (0, 0, 0, more)) if more else x
    found: Tensor = x.unflatten(2, (-1, tile))
    return found
