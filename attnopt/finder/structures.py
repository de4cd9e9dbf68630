"""Name a structure from samples of what it shows, and show what a name stands for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.nouns import Mask
from attnopt.ops.structure import options_of, visible_keys


def name_structure(seen: list[Tensor]) -> Mask:
    """Name (T, S) visibilities taken at several sizes, queries at the end of the keys."""
    for candidate in _candidates(seen):
        if all(torch.equal(v, structure(candidate, *v.shape)) for v in seen):
            return candidate
    return Mask("dense")


def structure(mask: Mask, queries: int, keys: int) -> Tensor:
    """Return the (T, S) visibility that a named mask stands for."""
    seen = visible_keys(queries, keys, **options_of(mask))
    return torch.ones(queries, keys, dtype=torch.bool) if seen is None else seen


def _candidates(seen: list[Tensor]) -> Iterator[Mask]:
    """Yield the named masks that the largest sample allows, the simplest first."""
    yield Mask("none")
    yield Mask("causal")
    widest = max(seen, key=lambda v: v.shape[-1])
    queries, keys = widest.shape
    counts = {int(v[-1].sum()) for v in seen}
    window = max(counts)
    yield Mask("sliding", window=window)
    yield from _beside_first(widest[-1])
    yield from _chunks(seen)
    reaches = [_reach(v) for v in seen]
    behind, ahead = (max(r[i] for r in reaches) for i in (0, 1))
    if ahead > 0:
        yield Mask("sliding", window=behind, right=ahead)
        if queries == keys:
            yield Mask("prefix", prefix=int(widest[0].sum()))


def _beside_first(row: Tensor) -> Iterator[Mask]:
    """Yield the window whose queries see the first keys, too, if the last row has a gap."""
    hidden = (~row).nonzero().flatten()
    if not len(hidden) or not row[0] or not row[-1]:
        return
    first, last = int(hidden[0]), int(hidden[-1])
    if last - first + 1 == len(hidden):
        yield Mask("sliding", window=len(row) - 1 - last, first=first)


def _reach(visible: Tensor) -> tuple[int, int]:
    """Return how far queries see back and ahead, at most."""
    queries, keys = visible.shape
    distance = (torch.arange(queries).unsqueeze(1) + keys - queries) - torch.arange(keys)
    if not visible.any():
        return 0, 0
    back = distance.masked_fill(~visible, -keys).max()
    ahead = -distance.masked_fill(~visible, keys).min()
    return int(back), int(ahead)


def _chunks(seen: list[Tensor]) -> Iterator[Mask]:
    """Yield chunk lengths that the last rows allow."""
    for v in seen:
        keys = v.shape[1]
        row = v[-1].nonzero().flatten()
        if len(row) and int(row[0]) > 0 and int(row[-1]) == keys - 1:
            start = int(row[0])
            for size in _divisors(start):
                if size >= keys - start:
                    yield Mask("chunked", window=size)
    for v in seen:
        if v.shape[0] == v.shape[1] and v[0].any():
            size = int(v[0].sum())
            if 0 < size < v.shape[1]:
                yield Mask("block", window=size)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
