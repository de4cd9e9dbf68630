"""Solving: the best choice for a budget, by damages that add up once each pass has its factor.

What rewrites spoil alone does not quite add up: refitting mends some of it, and large damages grow
together. So every combination of passes has a factor, fitted to plans that were measured whole, the
ones of a similar damage first; without any the factors are one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from attnopt.knapsack import Item, choose
from attnopt.search.candidates import Candidate

_PRIOR: Final = 0.15
_NEAR: Final = 0.7


@dataclass(frozen=True)
class Scored:
    """A candidate with all that is known: what it weighs, and the damage that it does alone."""

    candidate: Candidate
    weights: tuple[float, ...]
    damage: float


@dataclass(frozen=True)
class Measured:
    """A plan that was measured whole: its damages by passes, and what it cost in truth."""

    damages: Mapping[str, float]
    excess: float


@dataclass(frozen=True)
class Model:
    """The factors of the passes."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def factor(self, label: str) -> float:
        """Return the factor of a combination of passes: its own, or the mean of its parts'."""
        if label in self.factors:
            return self.factors[label]
        parts = [self.factors[p] for p in label.split("+") if p in self.factors]
        if parts:
            return sum(parts) / len(parts)
        known = list(self.factors.values())
        return sum(known) / len(known) if known else 1.0

    def predicted(self, damages: Mapping[str, float]) -> float:
        """Predict the cost of a plan."""
        return sum(self.factor(label) * damage for label, damage in damages.items())

    @classmethod
    def fitted(cls, plans: Sequence[Measured], near: float | None = None) -> "Model":
        """Fit the factors to measured plans, those first that cost about as much as `near`."""
        from scipy.optimize import nnls

        used = [p for p in plans if p.excess > 0 and sum(p.damages.values()) > 0]
        labels = sorted({label for p in used for label, d in p.damages.items() if d > 0})
        if not used:
            return cls()
        weights = [_importance(p, near) for p in used]
        ratios = [p.excess / sum(p.damages.values()) for p in used]
        common = math.exp(
            sum(w * math.log(r) for w, r in zip(weights, ratios, strict=True)) / sum(weights)
        )
        rows: list[list[float]] = []
        wanted: list[float] = []
        for plan, weight in zip(used, weights, strict=True):
            scale = weight / max(plan.excess, 1e-4)
            rows.append([scale * plan.damages.get(label, 0.0) for label in labels])
            wanted.append(scale * plan.excess)
        for number in range(len(labels)):
            rows.append([_PRIOR / common if i == number else 0.0 for i in range(len(labels))])
            wanted.append(_PRIOR)
        found, _ = nnls(np.array(rows), np.array(wanted))
        return cls({n: max(float(f), common / 10) for n, f in zip(labels, found, strict=True)})


def _importance(plan: Measured, near: float | None) -> float:
    if near is None or near <= 0:
        return 1.0
    return max(math.exp(-((math.log(plan.excess / near) / _NEAR) ** 2) / 2), 1e-3)


def damages_of(chosen: Sequence[Scored]) -> dict[str, float]:
    """Sum the damages of a plan by passes."""
    found: dict[str, float] = {}
    for scored in chosen:
        label = scored.candidate.label
        found[label] = found.get(label, 0.0) + scored.damage
    return found


def solve(
    rows: Sequence[Sequence[Scored]], budgets: Sequence[float], model: Model
) -> list[Scored] | None:
    """Choose for each site so that all budgets are kept with the least predicted cost."""
    items = [
        [Item(s, s.weights, model.factor(s.candidate.label) * s.damage) for s in row]
        for row in rows
    ]
    chosen = choose(items, list(budgets))
    return None if chosen is None else [item.what for item in chosen]
