"""Compensation: refit the output projections of rewritten sites to what the source computed.

Layer by layer, with the layers before it already rewritten and refitted: the least-squares solution
of `new inputs x new weight = old inputs x old weight` over the calibration data, with a small ridge
that pulls towards the weight as it was. Source and rewritten program run side by side and wait for
each other at every projection, so that each runs once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt import debug
from attnopt.calibrating import Statistics, inputs_of, kept_tokens, rows_of
from attnopt.program import Program
from attnopt.running import Run
from attnopt.weights import Spool

RIDGE = 1e-4


def refit(
    source: Program, rewritten: Program, parameters: Sequence[str], stats: Statistics, key: str
) -> Spool:
    """Return the given weights, refitted in order of execution.

    Moments are kept in `stats` under `key`, so that the same plan is replayed without data.
    """
    places = {name: f"{key}/{name}" for name in parameters}
    missing = [n for n, place in places.items() if place not in stats.refits]
    if missing and not stats.batches:
        raise ValueError(
            f"the plan's statistics have no moments for {missing[0]}: the plan was edited after "
            "them; calibrate again (attnopt.calibrate) and set them in the plan"
        )
    if missing:
        _gather(source, rewritten, places, stats)
    solved = Spool()
    for name, place in places.items():
        moments = stats.refits[place]
        solved[name] = _solve(rewritten.weights[name], source.weights[name], *moments)
    return solved


def _gather(
    source: Program, rewritten: Program, places: Mapping[str, str], stats: Statistics
) -> None:
    """Run both programs side by side and keep the moments of every projection."""
    old_wide, new_wide = source.cast(torch.float32), rewritten.cast(torch.float32)
    before, after = inputs_of(old_wide, places), inputs_of(new_wide, places)
    order = {node: i for i, node in enumerate(new_wide.graph.nodes)}
    old_nodes, new_nodes = set(before.values()), set(after.values())
    runs = [
        (Run(old_wide, b, old_nodes), Run(new_wide, b, new_nodes), kept_tokens(b))
        for b in stats.batches
    ]
    for number, name in enumerate(sorted(places, key=lambda n: order[after[n]]), 1):
        moments = _Moments()
        for old, new, kept in runs:
            moments.add(
                rows_of(new.until(after[name]), kept), rows_of(old.until(before[name]), kept)
            )
        stats.refits[places[name]] = moments.means()
        solved = _solve(rewritten.weights[name], source.weights[name], *moments.means())
        for _, new, _ in runs:
            new.weights[name] = solved.float()
        debug.advance("refit", number, len(places))


class _Moments:
    """The running sums of new^T new and new^T old."""

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.count = 0

    def add(self, new: Tensor, old: Tensor) -> None:
        """Add rows of inputs before and after."""
        new, old = new.double(), old.double()
        self.gram = self.gram + new.T @ new
        self.cross = self.cross + new.T @ old
        self.count += len(new)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return both moments."""
        return self.gram / self.count, self.cross / self.count


def _solve(now: Tensor, before: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """Return the weight (outputs, inputs) that makes the old outputs of the new inputs."""
    old = now.double()
    ridge = RIDGE * gram.diagonal().mean()
    left = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    right = cross @ before.double().T + ridge * old.T
    solved: Tensor = torch.linalg.solve(left, right).T.to(now.dtype).contiguous()
    return solved
