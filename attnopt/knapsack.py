"""The multiple-choice knapsack: one item a row, the least damage within every budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

_SLACK = 1e-9


@dataclass(frozen=True)
class Item(Generic[T]):
    """Something to choose, with what it weighs and the damage that it does.

    Where there are several budgets, it has as many weights.
    """

    what: T
    weight: float | tuple[float, ...]
    damage: float

    @property
    def weights(self) -> tuple[float, ...]:
        """What it weighs, one number a budget."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)


def choose(
    rows: Sequence[Sequence[Item[T]]], budget: float | Sequence[float]
) -> list[Item[T]] | None:
    """Return one item of every row whose weights fit the budgets, with the least damage.

    None where no choice fits. Solved by HiGHS, to the optimum.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    budgets = (budget,) if isinstance(budget, int | float) else tuple(budget)
    items = [item for row in rows for item in row]
    for number, limit in enumerate(budgets):
        if sum(min(i.weights[number] for i in row) for row in rows) > limit + _SLACK * abs(limit):
            return None
    once = np.zeros((len(rows), len(items)))
    start = 0
    for number, row in enumerate(rows):
        once[number, start : start + len(row)] = 1
        start += len(row)
    constraints = [LinearConstraint(once, 1, 1)]
    for number, limit in enumerate(budgets):
        weights = np.array([i.weights[number] for i in items])
        largest = max(np.abs(weights).max(), _SLACK)
        most = (limit + _SLACK * abs(limit)) / largest
        constraints.append(LinearConstraint(weights / largest, -np.inf, most))
    found = milp(
        np.array([i.damage for i in items]),
        integrality=np.ones(len(items), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        if found.status == _INFEASIBLE:
            return None
        raise RuntimeError(f"the solver found no choice: {found.message}")
    return [item for item, taken in zip(items, found.x, strict=True) if taken > 0.5]


_INFEASIBLE = 2
