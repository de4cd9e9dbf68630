"""Which keys the queries of a block see, read off a mask of all pairs."""

from typing import Final

import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.hidden import Hidden

# What is added to a score to hide it is less, and leaves nothing of it beside one that is not.
_HIDES: Final = -1e30


def shown_pairs(hidden: Hidden, queries: int, keys: int) -> Tensor | None:
    """Return which pairs a mask of all of them shows, (..., T, S); None where there is none.

    It may be added to the scores. Then each query has to see a key: what hidden ones give to a
    query without any depends on all of them.
    """
    mask, bias = hidden.mask, hidden.bias
    if mask is not None:
        return mask if mask.shape[-2:] == (queries, keys) else None
    if bias is None or hidden.padding is not None or bias.requires_grad:
        return None
    if bias.shape[-2:] != (queries, keys) or bias.shape[1:-2] not in ((), (1,)):
        return None
    shown: Tensor = bias > _HIDES
    within = hidden.structure.mask(queries, keys, bias.device)
    seen = shown if within is None else shown & within
    return shown if bool(seen.any(-1).all()) else None


def extents(mask: Tensor, size: int) -> list[tuple[int, int]]:
    """Return the first key that each block of `size` queries sees, and the key after the last.

    The mask is (..., T, S), true = visible; what any of its leading axes shows counts. A block that
    sees nothing gets (0, 1).
    """
    queries, keys = mask.shape[-2:]
    seen = mask.flatten(0, -3).any(0) if mask.dim() > 2 else mask
    blocks = F.pad(seen, (0, 0, 0, -queries % size)).unflatten(0, (-1, size)).any(1)
    some = blocks.any(1)
    first = blocks.int().argmax(1)
    last = (keys - blocks.flip(1).int().argmax(1)).masked_fill(~some, 1)
    return list(zip(first.tolist(), last.tolist(), strict=True))
