"""Trying: plans measured whole, one after another, as few as tell which is the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attnopt import debug
from attnopt.nouns import Choice, Plan
from attnopt.search.judging import Look, rate_of
from attnopt.search.measuring import Measuring
from attnopt.search.solving import Measured, Model, Scored, damages_of, solve
from attnopt.search.uniform import Uniform, reaching, thinned, uniform_plans

_ROUNDS: Final = 5
# A plan that is predicted to cost so many times what another was measured to is not measured.
_HOPELESS: Final = 1.5
# A prediction this close, as a share or in units of damage, is not corrected any more.
_CLOSE: Final = 0.1
_SMALL: Final = 0.003


@dataclass(frozen=True)
class Tried:
    """A plan that was measured whole: what was predicted of it, and what it costs on those rows.

    `cost` weighs loss and distance (`Look.cost`), `excess` is the loss alone, `weights` are by
    budget. `damages` sums by passes what its choices do alone.
    """

    name: str
    choices: tuple[Choice, ...] = field(repr=False)
    weights: tuple[float, ...]
    damages: Mapping[str, float] = field(repr=False)
    predicted: float
    cost: float
    excess: float
    error: float
    within: bool = True

    @property
    def added(self) -> float:
        """The sum of what its choices do alone."""
        return sum(self.damages.values())

    @property
    def measured(self) -> Measured:
        """This as something to fit factors to."""
        return Measured(self.damages, self.cost)

    def content(self) -> dict[str, Any]:
        """Return this as JSON values, without the choices."""
        names = ("name", "weights", "predicted", "cost", "excess", "error", "within", "added")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Foregone:
    """A plan within the budgets that was not measured, and what it was predicted to cost."""

    name: str
    choices: tuple[Choice, ...] = field(repr=False)
    predicted: float


class Trials:
    """Plans measured whole, one after another."""

    def __init__(
        self, measuring: Measuring, rows: Sequence[Sequence[Scored]], budgets: Sequence[float]
    ) -> None:
        self.measuring = measuring
        self.rows = rows
        self.budgets = budgets
        self.tried: list[Tried] = []
        self.foregone: list[Foregone] = []
        self._fitting: list[Uniform] = []
        self._rate = 1.0

    def try_alike(self, kinds: Mapping[str, str]) -> None:
        """Try every pass with one setting everywhere: a few of each, from weak to strong.

        They are the same for every budget: the factors of the passes are fitted to them.
        """
        by_site = {row[0].candidate.site: row for row in self.rows}
        families = list(uniform_plans(by_site, kinds).values())
        few = [plan for plans in families for plan in thinned(plans)]
        looks: list[Look] = []
        for number, plan in enumerate(few, 1):
            looks.append(self.measuring.whole(plan.choices))
            debug.advance("alike", number, len(few))
        self._rate = rate_of(looks)
        fitting = [plan for plans in families for plan in reaching(plans, self.budgets)[:1]]
        self._fitting = [plan for plan in fitting if plan not in few]
        for plan in few:
            self._note(plan)

    def try_fitting(self) -> None:
        """Try of every pass the setting that just fits, where it may be the best plan."""
        model = Model.fitted([t.measured for t in self.tried])
        best = min((t.cost for t in self.tried if t.within), default=math.inf)
        told = [(model.predicted(damages_of(plan.chosen)), plan) for plan in self._fitting]
        for predicted, plan in sorted(told, key=lambda x: (x[0], x[1].name)):
            if predicted > max(_HOPELESS * best, best + _SMALL):
                self.foregone.append(Foregone(plan.name, plan.choices, predicted))
            else:
                self._note(plan)
                best = min(best, self.tried[-1].cost)

    def _note(self, plan: Uniform) -> None:
        damages = damages_of(plan.chosen)
        added = sum(damages.values())
        self._try(plan.name, plan.choices, plan.weights, damages, added)

    def try_given(self, plan: Plan) -> None:
        """Try a plan that is known to be within the budgets."""
        name = "+".join(sorted({c.rewrite for c in plan.choices}))
        self._try(f"{name} everywhere, as much as it takes", plan.choices, (), {}, 0.0)

    def try_mixed(self) -> None:
        """Solve, measure, correct the factors by what is found, and solve again until they hold."""
        seen: list[tuple[Choice, ...]] = []
        near: float | None = None
        for number in range(1, _ROUNDS + 1):
            model = Model.fitted([t.measured for t in self.tried], near)
            chosen = solve(self.rows, self.budgets, model)
            choices = _choices(chosen or ())
            if chosen is None or choices in seen:
                return
            seen.append(choices)
            damages = damages_of(chosen)
            weights = tuple(sum(w) for w in zip(*(s.weights for s in chosen), strict=True))
            predicted = model.predicted(damages)
            made = self._try(f"mixed, round {number}", choices, weights, damages, predicted)
            debug.advance("verify", number, _ROUNDS)
            if abs(predicted - made.cost) <= max(_CLOSE * made.cost, _SMALL):
                return
            near = made.cost

    def _try(
        self,
        name: str,
        choices: tuple[Choice, ...],
        weights: tuple[float, ...],
        damages: Mapping[str, float],
        predicted: float,
    ) -> Tried:
        look = self.measuring.whole(choices)
        fits = all(w <= b * (1 + 1e-9) for w, b in zip(weights, self.budgets, strict=False))
        cost = look.cost(self._rate)
        made = Tried(
            name, choices, weights, damages, predicted, cost, look.excess, look.error, fits
        )
        self.tried.append(made)
        return made


def _choices(chosen: Sequence[Scored]) -> tuple[Choice, ...]:
    return tuple(
        choice
        for item in chosen
        for choice in item.candidate.choices(f"alone it costs {item.damage:.4f}")
    )
