"""The multiple-choice knapsack: one item a row, the least damage within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Item(Generic[T]):
    """Something to choose, with what it weighs and the damage that it does."""

    what: T
    weight: float
    damage: float


def choose(rows: Sequence[Sequence[Item[T]]], budget: float) -> list[Item[T]] | None:
    """Return one item of every row whose weights fit the budget, with the least damage.

    None where even the lightest items do not fit. Solved by HiGHS, to the optimum.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    items = [item for row in rows for item in row]
    if sum(min(i.weight for i in row) for row in rows) > budget * (1 + 1e-9):
        return None
    once = np.zeros((len(rows), len(items)))
    start = 0
    for number, row in enumerate(rows):
        once[number, start : start + len(row)] = 1
        start += len(row)
    weights = np.array([i.weight for i in items])
    largest = max(weights.max(), 1.0)
    found = milp(
        np.array([i.damage for i in items]),
        integrality=np.ones(len(items), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(weights / largest, -np.inf, budget * (1 + 1e-9) / largest),
        ],
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no choice: {found.message}")
    return [item for item, taken in zip(items, found.x, strict=True) if taken > 0.5]
