"""Which tiles a row visits, by the scores of its tiles: by number, by mass or by a threshold.

Scores are logarithms of mass, in float32; of equal ones the tile further left comes first. Tiles
that are forced come before all others and count as part of the budget.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_ROUNDING: Final = 1e-6


def select(
    scores: Tensor, allowed: Tensor, forced: Tensor, rule: str, amount: float, multiple: int = 1
) -> Tensor:
    """Return the tiles that a rule selects, as booleans like the scores (B, P, I, J).

    `topk` keeps a share of the allowed tiles of a row, `count` so many, `mass` the fewest that hold
    a share of the mass, `threshold` those that hold at least that share. Numbers of tiles are
    rounded up to a multiple.
    """
    allowed = allowed.expand_as(scores)
    forced = forced.expand_as(scores) & allowed
    # What is allowed and of no mass still comes before what is not allowed.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~allowed, -torch.inf)
    chosen = RULES[rule](scores, allowed, forced, amount, multiple)
    return (chosen | forced) & allowed


def _topk(scores: Tensor, allowed: Tensor, forced: Tensor, amount: float, multiple: int) -> Tensor:
    count = torch.ceil(allowed.sum(-1, keepdim=True) * amount - _ROUNDING)
    return _first(scores, forced, count, multiple)


def _count(scores: Tensor, allowed: Tensor, forced: Tensor, amount: float, multiple: int) -> Tensor:
    return _first(scores, forced, torch.full_like(scores[..., :1], amount), multiple)


def _first(scores: Tensor, forced: Tensor, count: Tensor, multiple: int) -> Tensor:
    """Keep the first so many in the order of the scores."""
    count = torch.ceil(count / multiple) * multiple
    place = torch.arange(scores.shape[-1], device=scores.device)
    return _unsorted(_order(scores, forced), place < count)


def _mass(scores: Tensor, allowed: Tensor, forced: Tensor, amount: float, multiple: int) -> Tensor:
    """Keep the fewest that hold the mass; all of them where it is the whole mass."""
    if amount >= 1:
        return allowed
    order = _order(scores, forced)
    share = _shares(scores).gather(-1, order)
    before = share.cumsum(-1) - share
    count = (before < amount).sum(-1, keepdim=True)
    return _first(scores, forced, count, multiple)


def _threshold(
    scores: Tensor, allowed: Tensor, forced: Tensor, amount: float, multiple: int
) -> Tensor:
    count = (_shares(scores) >= amount).sum(-1, keepdim=True)
    return _first(scores, torch.zeros_like(forced), count, multiple)


RULES: Final[dict[str, Callable[..., Tensor]]] = {
    "topk": _topk,
    "count": _count,
    "mass": _mass,
    "threshold": _threshold,
}


def _order(scores: Tensor, forced: Tensor) -> Tensor:
    """Return the tiles of each row, forced ones first, then by score, then by index."""
    keys = scores.masked_fill(forced, torch.inf)
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices


def _unsorted(order: Tensor, chosen: Tensor) -> Tensor:
    """Bring what was chosen in order back to the places of the tiles."""
    return torch.zeros_like(chosen.expand_as(order)).scatter(-1, order, chosen.expand_as(order))


def _shares(scores: Tensor) -> Tensor:
    """Return the share of each tile in the mass of its row; zeros where there is none."""
    top = scores.amax(-1, keepdim=True)
    mass = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
