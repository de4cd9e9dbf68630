"""The search: candidates, their damage, the best choice, and what it costs in truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from attnopt import debug
from attnopt.goals import BUDGETS, budgets_of
from attnopt.nouns import Choice, Mlp, No, Plan, Site
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.search.judging import Look, rate_of
from attnopt.search.listing import Listed, Lister, scored
from attnopt.search.measuring import Measuring
from attnopt.search.solving import Measured, Model, Scored, damages_of, solve
from attnopt.search.uniform import Uniform, reaching, thinned, uniform_plans

_ROUNDS: Final = 5
# A prediction this close, as a share or in units of damage, is not corrected any more.
_CLOSE: Final = 0.1
_SMALL: Final = 0.003
_SHARES: Final = (
    *(0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.45, 0.4, 0.375, 0.35, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1),
)


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
class Found:
    """What a search has found: the best plan, those beside it, and what was seen on the way.

    `goals` name the budgets and `weights` what the source takes of each; `front` has shares of the
    first budget with what the best plan there is predicted to cost; `tried` is what was measured
    whole, the best first; `made` counts the scores that were not known before.
    """

    best: Tried
    tried: tuple[Tried, ...]
    base: float
    unit: str
    goals: tuple[str, ...]
    weights: Mapping[str, float]
    front: tuple[tuple[float, float], ...]
    rows: tuple[tuple[Scored, ...], ...]
    refused: tuple[No, ...]
    made: int

    @property
    def points(self) -> tuple[dict[str, Any], ...]:
        """Plans by the share that they leave of the first budget and what they lose, for a report.

        What the best plan of each share is predicted to lose, and the plans that were measured.
        """
        whole = self.weights[self.goals[0]]
        best = [{"cost": share, "damage": lost, "label": "predicted"} for share, lost in self.front]
        measured = [
            {
                "cost": plan.weights[0] / whole,
                "damage": plan.cost,
                "label": plan.name,
                "chosen": plan is self.best,
            }
            for plan in self.tried
            if plan.weights and whole
        ]
        return (*best, *measured)

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "goals": list(self.goals),
            "source": dict(self.weights),
            "base": self.base,
            "unit": self.unit,
            "best": self.best.content(),
            "tried": [t.content() for t in self.tried],
            "front": [list(point) for point in self.front],
            "sites": {row[0].candidate.site: [_told(x) for x in row] for row in self.rows},
            "refused": [str(no) for no in self.refused],
            "measured_now": self.made,
        }


def _told(scored: Scored) -> dict[str, Any]:
    steps = [[s.rewrite, s.settings] for s in scored.candidate.steps]
    return {"steps": steps, "weights": list(scored.weights), "damage": scored.damage}


def search(lister: Lister, goal: Mapping[str, float], *, extra: Sequence[Plan] = ()) -> Found:
    """Find the plan that keeps every budget of a goal at the least cost.

    `extra` are further plans that are known to keep them; they are measured beside the others.
    """
    measuring, goals = lister.measuring, lister.asked.goals
    source = measuring.source(goals)
    budgets = [budgets_of(goal)[n] * source[n] for n in goals]
    listed = _listed(lister)
    rows = scored(listed, measuring, goals)
    _must_be_reachable(rows, budgets, source, goals)
    trials = _Trials(measuring, rows, budgets)
    trials.try_alike({x.thing.name: _kind(x.thing) for x in listed})
    for plan in extra:
        trials.try_given(plan)
    if lister.asked.tier:
        trials.try_mixed()
    able = sorted((t for t in trials.tried if t.within), key=lambda t: (t.cost, t.name))
    if not able:
        raise NothingToDoError(
            "no pass that treats all layers alike keeps the budget; ask for --tier 1 or 2"
        )
    return Found(
        able[0],
        tuple(able),
        measuring.whole(able[0].choices).base,
        measuring.unit(),
        goals,
        source,
        _front(rows, budgets, source, Model.fitted([t.measured for t in trials.tried])),
        tuple(tuple(row) for row in rows),
        tuple(no for item in listed for no in item.refused),
        measuring.scores.made,
    )


def _kind(thing: Site | Mlp) -> str:
    return "MLP" if isinstance(thing, Mlp) else "attention"


def searched_things(main: Program, goals: Sequence[str]) -> list[Site | Mlp]:
    """List what could serve some goals."""
    if set(goals) <= {"kv_cache"}:
        return [s for s in main.sites if s.cached]
    return [*main.sites, *main.mlps]


def _listed(lister: Lister) -> list[Listed]:
    """List the candidates of every site that could serve the goals."""
    goals = lister.asked.goals
    things = searched_things(lister.asked.program.main, goals)
    if not things:
        raise NothingToDoError("no attention of this program keeps a cache of keys and values")
    found: list[Listed] = []
    for number, thing in enumerate(things, 1):
        found.append(lister.listed(thing))
        debug.advance("score", number, len(things))
    if not any(item.weighed for item in found):
        why = next((str(no) for item in found for no in item.refused), "no pass applies")
        raise NothingToDoError(f"nothing can be saved of {', '.join(goals)}: {why}")
    return found


def _must_be_reachable(
    rows: Sequence[Sequence[Scored]],
    budgets: Sequence[float],
    source: Mapping[str, float],
    goals: Sequence[str],
) -> None:
    for number, (name, budget) in enumerate(zip(goals, budgets, strict=True)):
        least = sum(min(s.weights[number] for s in row) for row in rows)
        if least > budget * (1 + 1e-9):
            share, lowest = budget / source[name], least / source[name]
            raise NothingToDoError(
                f"no plan leaves {share:.4g} of {BUDGETS[name]}; the least is {lowest:.4g} "
                f"(--{name.replace('_', '-')} {lowest:.4%})"
            )


class _Trials:
    """Plans measured whole, one after another."""

    def __init__(
        self, measuring: Measuring, rows: Sequence[Sequence[Scored]], budgets: Sequence[float]
    ) -> None:
        self.measuring = measuring
        self.rows = rows
        self.budgets = budgets
        self.tried: list[Tried] = []
        self._rate = 1.0

    def try_alike(self, kinds: Mapping[str, str]) -> None:
        """Try every pass with one setting everywhere: a few of each, and what just fits.

        The few are the same for every budget: the factors of the passes are fitted to them.
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
        for plan in (*few, *(p for p in fitting if p not in few)):
            self._note(plan)

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
            if number > 1 and abs(predicted - made.cost) <= max(_CLOSE * made.cost, _SMALL):
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


def _front(
    rows: Sequence[Sequence[Scored]],
    budgets: Sequence[float],
    source: Mapping[str, float],
    model: Model,
) -> tuple[tuple[float, float], ...]:
    """Solve for other shares of the first budget; list what each is predicted to cost."""
    first, *others = budgets
    whole = next(iter(source.values()))
    found: list[tuple[float, float]] = []
    for share in sorted({*_SHARES, round(first / whole, 6)}, reverse=True):
        chosen = solve(rows, [share * whole, *others], model)
        if chosen is not None:
            found.append((share, model.predicted(damages_of(chosen))))
    return tuple(found)
