"""The search: candidates, their damage, the best choice, and what it costs in truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from attnopt import debug
from attnopt.goals import BUDGETS, budgets_of
from attnopt.nouns import Mlp, No, Plan, Site
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.search.listing import Listed, Lister, scored
from attnopt.search.solving import Model, Scored, damages_of, solve
from attnopt.search.trying import Foregone, Trials, Tried

_SHARES: Final = (
    *(0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.45, 0.4, 0.375, 0.35, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1),
)


@dataclass(frozen=True)
class Found:
    """What a search has found: the best plan, those beside it, and what was seen on the way.

    `goals` name the budgets and `weights` what the source takes of each; `front` has shares of the
    first budget with what the best plan there is predicted to cost; `tried` is what was measured
    whole, the best first, and `foregone` what was not, since it is predicted to cost far more;
    `made` counts the scores that were not known before.
    """

    best: Tried
    tried: tuple[Tried, ...]
    foregone: tuple[Foregone, ...]
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
            "foregone": [{"name": f.name, "predicted": f.predicted} for f in self.foregone],
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
    trials = Trials(measuring, rows, budgets)
    trials.try_alike({x.thing.name: _kind(x.thing) for x in listed})
    for plan in extra:
        trials.try_given(plan)
    if lister.asked.tier:
        trials.try_mixed()
    trials.try_fitting()
    able = sorted((t for t in trials.tried if t.within), key=lambda t: (t.cost, t.name))
    if not able:
        raise NothingToDoError(
            "no pass that treats all layers alike keeps the budget; ask for --tier 1 or 2"
        )
    return Found(
        able[0],
        tuple(able),
        tuple(trials.foregone),
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
