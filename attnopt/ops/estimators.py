"""How much of a row's attention falls on each tile of keys, estimated from few numbers.

An estimator returns scores (B, P, G, I, J) in float32 that grow like the logarithm of the mass on a
tile, and the tiles that it wants visited whatever the rule, if any. s is the scale of the scores.

    pooled          mean(q) . mean(k) s, and the logarithm of the number of keys
    sub_block       log sum over parts a of the queries, c of the keys: exp(mean(q_a) . mean(k_c) s)
    antidiagonal    softmax of sums along antidiagonals of stride x stride blocks, summed over tiles
    vertical_slash  what the last queries spend on the columns and the diagonals of a tile
    flex            vertical_slash for the heads whose last rows are unlike what pooling says
    sparge          pooled; tiles of unlike tokens, which no mean stands for, are visited

https://arxiv.org/abs/2503.16428 (antidiagonal), 2407.02490 (vertical_slash), 2502.20766 (flex),
2502.18137 (sparge).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.blocks import tiles_in
from attnopt.ops.tiling import Tiling, is_known, tiles_of

# Scores that are held at once.
_CELLS: Final = 2**22
# Stripes of a causal map: each leaves out the keys behind it.
_STRIPES: Final = 8
# As published: queries that stand for all, diagonals that are always visited (at most a tile), the
# largest distance of a map from its estimate (the root of a Jensen-Shannon divergence).
_LAST_QUERIES: Final = 64
_LAST_DIAGONALS: Final = 100
_FAR: Final = 0.1

Scores = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Call:
    """Queries (B, H, T, D) and keys (B, P, S, D) of a call, cut into tiles.

    `stride` is how many tokens share a mean, or how far the samples of an antidiagonal are apart;
    tiles whose mean cosine is at most `alike` are of unlike tokens.
    """

    q: Tensor
    k: Tensor
    scale: float
    tiling: Tiling
    stride: int
    alike: float

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scaled products (B, P, G, I, J) of what stands for queries and keys."""
        heads = k.shape[1]
        group = q.shape[1] // heads
        # The rows of a group in one product: keys need not be repeated.
        rows = q.unflatten(1, (heads, group)).flatten(2, 3)
        products = rows @ (k * self.scale).transpose(-1, -2)
        found: Tensor = products.unflatten(2, (group, q.shape[2]))
        return found

    def stripes(self, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows of tiles, and the columns that they may see, in pieces that fit the cache.

        A traced graph, which does not know its sizes, has one piece.
        """
        rows, columns = self.tiling.rows, self.tiling.columns
        if not is_known(rows) or torch.compiler.is_compiling():
            yield slice(None), slice(None)
            return
        parts = max(self.tiling.q_tile // length, 1) * max(self.tiling.k_tile // length, 1)
        cells = max(columns, 1) * parts * self.q.shape[0] * self.q.shape[1]
        count = max(1, min(_CELLS // cells, tiles_in(rows, _STRIPES)))
        for start in range(0, rows, count):
            stop = min(start + count, rows)
            last = self.tiling.keys - self.tiling.queries + stop * self.tiling.q_tile - 1
            seen = columns if not self.tiling.causal else last // self.tiling.k_tile + 1
            yield slice(start, stop), slice(0, min(max(seen, 1), columns))


def pooled(call: Call) -> Scores:
    """Score by means of whole tiles."""
    tiling = call.tiling
    scores = call.scores(tiling.query_means(call.q), tiling.key_means(call.k))
    return scores + tiling.key_counts().log()[:, :, None, None], None


def sub_block(call: Call) -> Scores:
    """Score by means of parts of tiles; with one token a part it is the mass itself."""
    fine = call.tiling.finer(call.stride)
    return _summed(call, fine.query_means(call.q), fine.key_means(call.k), by_row=False), None


def antidiagonal(call: Call) -> Scores:
    """Score by every stride-th antidiagonal."""
    fine = call.tiling.finer(call.stride)
    q = tiles_of(call.q, call.stride, fine.query_padding).flip(3).flatten(3)
    k = tiles_of(call.k, call.stride, fine.padding).flatten(3) / call.stride
    return _summed(call, q, k, by_row=True), None


def vertical_slash(call: Call) -> Scores:
    """Score a tile by its columns and its diagonals, as the last queries weigh them."""
    seen = _last_map(call, min(_LAST_QUERIES, call.tiling.queries))
    near = call.tiling.first_positions() - call.tiling.first_keys()
    tile = call.tiling.k_tile
    forced = near - (tile - 1) < min(_LAST_DIAGONALS, tile)
    return _vertical_slash(call, seen), forced


def flex(call: Call) -> Scores:
    """Trust pooled scores where they say what the last queries do; else follow those queries."""
    tiling = call.tiling
    seen = _last_map(call, tiling.queries - (tiling.rows - 1) * tiling.q_tile)
    true = _by_tile(seen.mean(3), tiling.k_tile)
    scores, _ = pooled(call)
    allowed = tiling.allowed()[:, :, None, -1]
    own = scores[..., -1, :].masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    middle = (true + own) / 2
    divergence = (_relative_entropy(true, middle) + _relative_entropy(own, middle)) / 2
    similar = divergence.clamp(min=0).sqrt() < _FAR
    return torch.where(similar[..., None, None], scores, _vertical_slash(call, seen)), None


def sparge(call: Call) -> Scores:
    """Score by means of tiles, where tokens of a tile are alike."""
    tiling = call.tiling
    rows = (
        _likeness(call.q, tiling.q_tile, tiling.query_padding, tiling.query_counts()) <= call.alike
    )
    columns = _likeness(call.k, tiling.k_tile, tiling.padding, tiling.key_counts()) <= call.alike
    scores, _ = pooled(call)
    rows = rows.unflatten(1, (call.k.shape[1], -1)).any(2)
    columns = columns.unsqueeze(2)
    return scores.masked_fill(columns.unsqueeze(2), -torch.inf), rows.unsqueeze(-1) | columns


ESTIMATORS: Final[dict[str, Callable[[Call], Scores]]] = {
    "pooled": pooled,
    "sub_block": sub_block,
    "antidiagonal": antidiagonal,
    "flex": flex,
    "vertical_slash": vertical_slash,
    "sparge": sparge,
}
CAUSAL_ONLY: Final = ("flex", "vertical_slash")
STRIDED: Final = ("sub_block", "antidiagonal")


def group_scores(scores: Tensor, allowed: Tensor) -> Tensor:
    """Return one score a group of heads, (B, P, I, J): the logarithm of their shares' sum."""
    if scores.shape[2] == 1:
        return scores.squeeze(2)
    shares = scores.masked_fill(~allowed.unsqueeze(2), -torch.inf).log_softmax(-1)
    return torch.logsumexp(shares, dim=2).nan_to_num(nan=-torch.inf)


def _summed(call: Call, q: Tensor, k: Tensor, *, by_row: bool) -> Tensor:
    """Return the logarithm of the mass on each tile from the scores of its parts.

    `by_row` every row of parts has the mass of its queries; else as much as its scores say.
    """
    tiling, fine = call.tiling, call.tiling.finer(call.stride)
    across, down = tiling.q_tile // call.stride, tiling.k_tile // call.stride
    allowed = fine.allowed().unsqueeze(2)
    keys = fine.key_counts().log()[:, :, None, None]
    queries = fine.query_counts().log()[:, :, None, :, None]
    found: list[Tensor] = []
    for rows, columns in call.stripes(call.stride):
        part, other = _parts(rows, across), _parts(columns, down)
        hidden = torch.where(allowed[..., part, other], keys[..., other], -torch.inf)
        # In place: memory that is new to a process costs more than the arithmetic.
        scores = call.scores(q[:, :, part], k[:, :, other]).add_(hidden)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        mass = _by_tile(scores.sub_(top).exp_(), down)
        whole = mass.sum(-1, keepdim=True).log() if by_row else -top
        logs = mass.log() - whole + queries[:, :, :, part]
        logs = F.pad(logs, (0, 0, 0, _missing(logs.shape[-2], across)), value=-torch.inf)
        tiles = torch.logsumexp(logs.unflatten(-2, (-1, across)), dim=-2).nan_to_num(
            nan=-torch.inf, neginf=-torch.inf
        )
        more = tiling.columns - tiles.shape[-1]
        found.append(F.pad(tiles, (0, more), value=-torch.inf))
    return torch.cat(found, dim=-2)


def _parts(tiles: slice, count: int) -> slice:
    """Return the parts of some tiles."""
    return tiles if tiles.stop is None else slice(tiles.start * count, tiles.stop * count)


def _by_tile(x: Tensor, length: int) -> Tensor:
    """Sum so many neighbours of the last axis."""
    whole = F.pad(x, (0, _missing(x.shape[-1], length)))
    found: Tensor = whole.unflatten(-1, (-1, length)).sum(-1)
    return found


def _missing(size: int, length: int) -> int:
    """Return how much the last of such lengths lacks."""
    return tiles_in(size, length) * length - size


def _last_map(call: Call, count: int) -> Tensor:
    """Return the attention of the last queries, (B, P, G, count, S)."""
    tiling = call.tiling
    scores = call.scores(call.q[:, :, tiling.queries - count :].float(), call.k.float())
    key = torch.arange(tiling.keys, device=tiling.device)
    seen = key <= key[tiling.keys - count :].unsqueeze(1)
    if tiling.padding is not None:
        seen = seen & tiling.padding
    seen = seen.expand(scores.shape[0], 1, count, -1).unsqueeze(2)
    return scores.masked_fill_(~seen, -torch.inf).softmax(-1).nan_to_num_()


def _vertical_slash(call: Call, seen: Tensor) -> Tensor:
    """Score tiles by the mass that a map of the last queries has on columns and on diagonals."""
    tiling = call.tiling
    count, keys = seen.shape[-2:]
    columns = _by_tile(seen.mean(3), tiling.k_tile)
    # Shifted against each other, the rows have what is as far behind its query below each other.
    skewed = F.pad(seen.flip(3), (0, count)).flatten(3)[..., : count * (keys + count - 1)]
    behind = skewed.unflatten(3, (count, -1)).mean(3)[..., :keys].flip(-1)
    # Of the pairs of a tile, most are as far apart as its corners; the numbers fall off linearly.
    tile = tiling.k_tile
    fall = 1 - torch.arange(1 - tile, tile, device=tiling.device).abs() / tile
    over = (tiling.keys - tiling.queries) % tile
    around = F.pad(behind.flatten(0, 2).unsqueeze(1), (tile - 1, 2 * tile))[..., over:]
    diagonals = F.conv1d(around, fall[None, None], stride=tile).squeeze(1)
    diagonals = diagonals.unflatten(0, behind.shape[:3])
    place = torch.div(
        tiling.first_positions() - tiling.first_keys(), tile, rounding_mode="floor"
    ).clamp(min=0)
    masses: Tensor = columns.unsqueeze(3) + diagonals[..., place]
    return masses.log()


def _likeness(x: Tensor, tile: int, padding: Tensor | None, counts: Tensor) -> Tensor:
    """Return the mean cosine between the tokens of each tile, (B, H, tiles)."""
    alike = tiles_of(F.normalize(x.float(), dim=-1), tile, padding).sum(3)
    return alike.square().sum(-1) / counts.clamp(min=1).square()


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Return the sum of p log(p / q) over the last axis."""
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
