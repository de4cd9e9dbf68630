"""Spread heads over attentions: more of them where leaving some out does more damage.

Each attention is rewritten alone, with every number of its heads, and judged by how far the results
on some calibration rows are from the source's then. Of all numbers that keep the average, those
with the least sum of damages are taken (`attnopt.knapsack`).
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from attnopt import debug
from attnopt.knapsack import Item
from attnopt.knapsack import choose as least_damage
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Plan
from attnopt.probing import first_rows, rows_in
from attnopt.program import Program

# Rows that are enough to tell damages apart, and numbers of heads that an attention is tried at.
_ROWS: Final = 16
_STEPS: Final = 8

Ways = Mapping[int, Choice | None]


def numbers(heads: int) -> list[int]:
    """List numbers of heads worth trying, from one to all."""
    step = max(heads / _STEPS, 1)
    return sorted({1, heads, *(round(step * n) for n in range(1, _STEPS) if step * n < heads)})


@torch.no_grad()
def spread(
    program: Program, statistics: Statistics, ways: Mapping[str, Ways], average: float
) -> dict[str, int]:
    """Return a number of heads for each site, so many on average at most.

    `ways` says how a site has a number of heads; None where it has them as it is.
    """
    if not statistics.batches:
        raise ValueError(
            "the statistics came without their rows, on which numbers of heads are tried; "
            "calibrate again, or say how many heads each site uses"
        )
    damages = _damages(program, statistics, ways)
    rows = [
        [Item((name, count), float(count), damage) for count, damage in found.items()]
        for name, found in damages.items()
    ]
    chosen = least_damage(rows, average * len(rows))
    if chosen is None:
        least = sum(min(found) for found in ways.values()) / len(ways)
        raise ValueError(f"{average:.4g} heads on average: they are {least:.4g} at least")
    return dict(item.what for item in chosen)


def _damages(
    program: Program, statistics: Statistics, ways: Mapping[str, Ways]
) -> dict[str, dict[int, float]]:
    """Return how far the results are from the source's, for each way alone."""
    from attnopt.rewriting import apply
    from attnopt.search.judging import Judge

    judge = Judge(program, _few(statistics))
    found: dict[str, dict[int, float]] = {name: {} for name in ways}
    for number, (name, own) in enumerate(ways.items(), 1):
        for count, choice in own.items():
            found[name][count] = 0.0
            if choice is not None:
                made = apply(program, Plan((choice,), statistics=statistics))
                found[name][count] = judge.look(made).divergence
        debug.advance("spread", number, len(ways))
    return found


def _few(statistics: Statistics) -> list[dict[str, Any]]:
    """Return calls of the first rows."""
    found: list[dict[str, Any]] = []
    left = _ROWS
    for batch in statistics.batches:
        if left > 0:
            found.append(first_rows(batch, left))
            left -= rows_in(batch)
    return found
