"""What a search needs: the program in its exact form, statistics, rows to judge by, a place."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt import debug
from attnopt import passes as registry
from attnopt.costs import Workload, default_workload
from attnopt.data import Split, batches_of
from attnopt.goals import BUDGETS, budgets_of
from attnopt.keeping import FORMAT, NAMED, calibrated, folder_of, refits_of
from attnopt.moments import Statistics
from attnopt.nouns import Plan
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.resuming import data_digest
from attnopt.rewriting import apply
from attnopt.search.candidates import Asked
from attnopt.search.listing import Lister
from attnopt.search.measuring import Measuring
from attnopt.search.rules import Rule, unused
from attnopt.search.scores import Scores
from attnopt.search.searching import Found, search
from attnopt.weights import fingerprint


@dataclass(frozen=True)
class Terms:
    """What is allowed: the highest tier, passes (none: all), rules, devices, a length of text."""

    tier: int = 0
    passes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    tensor_parallel: int = 1
    tokens: int | None = None


def searched(
    program: Program,
    goal: Mapping[str, float],
    data: Any,
    terms: Terms,
    *,
    statistics: Statistics | None = None,
    told: Mapping[str, Any] | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Plan:
    """Search for the best plan; `told` is what it says of where it came from."""
    exact = apply(program, "exact")
    _check(exact, terms)
    place = None if work is None else folder_of(work, exact, data)
    if statistics is None:
        statistics = calibrated(exact, data, place)
    lister = _lister(exact, goal, data, terms, statistics, place)
    found = search(lister, goal, extra=_budgeted(exact, goal, terms))
    provenance = {**(told or {}), **_provenance(found, lister)}
    made = Plan(found.best.choices, dict(goal), provenance, search=found)
    refits = lister.measuring.refits(made.choices, refits_of(made, place))
    return replace(made, statistics=replace(statistics, memo={}, refits=refits))


def _check(program: Program, terms: Terms) -> None:
    """Raise ValueError for rules that are about nothing, and for passes that are not there."""
    for name in (*terms.passes, *(n for r in terms.rules for n in r.passes or ())):
        registry.load(name)
    check_rules(program, terms.rules)
    if terms.tensor_parallel < 1:
        raise ValueError(f"tensor_parallel {terms.tensor_parallel} must be at least 1")
    if not _names(program):
        raise NothingToDoError("no attention and no MLP was found that could be rewritten")


def check_rules(program: Program, rules: Sequence[Rule]) -> None:
    """Raise ValueError for rules that are about nothing."""
    names = _names(program) if rules else []
    idle = unused(rules, names)
    if idle:
        raise ValueError(
            f"the rule '{idle[0]}' decides about no site: its pattern fits none, or rules before "
            f"it cover them; sites are named like {', '.join(names[:2])}"
        )


def _names(program: Program) -> list[str]:
    """List the names of all that can be rewritten."""
    main = program.main
    return [*(s.name for s in main.sites), *(m.name for m in main.mlps)]


def _lister(
    program: Program,
    goal: Mapping[str, float],
    data: Any,
    terms: Terms,
    statistics: Statistics,
    place: Path | None,
) -> Lister:
    calls = rows_of(program, data, statistics)
    seen = length_of(calls)
    workload = _workload(program, terms.tokens or seen)
    scores = _scores(program, statistics, calls, workload, place)
    goals = tuple(budgets_of(goal))
    asked = Asked(program, statistics, goals, terms.tier, workload.sequence, seen)
    names = names_of(terms)
    measuring = Measuring(program, statistics, calls, workload, scores)
    return Lister(asked, measuring, names, terms.rules, terms.tensor_parallel)


def names_of(terms: Terms) -> tuple[str, ...]:
    """Return the passes that are asked."""
    return terms.passes or tuple(n for n in registry.names() if not registry.load(n).exact)


def rows_of(program: Program, data: Any, statistics: Statistics) -> list[dict[str, Any]]:
    """Return calls to judge by: rows that nothing is solved on, or those of the calibration."""
    if isinstance(data, Split) and data.scoring is not None:
        return list(batches_of(program, data.scoring, labels=True))
    if not statistics.batches:
        raise ValueError(
            "the statistics came without their rows, which plans are judged on: give the data, or "
            "calibrate again"
        )
    return [dict(batch) for batch in statistics.batches]


def length_of(calls: list[dict[str, Any]]) -> int:
    """Return the length of the longest row of tokens; 0 where rows are no text."""
    ids = [call.get("input_ids") for call in calls]
    return max((i.shape[1] for i in ids if isinstance(i, Tensor) and i.dim() == 2), default=0)


def _workload(program: Program, tokens: int) -> Workload:
    usual = default_workload(program)
    return replace(usual, sequence=tokens) if tokens and usual.sequence else usual


def _scores(
    program: Program,
    statistics: Statistics,
    calls: list[dict[str, Any]],
    workload: Workload,
    place: Path | None,
) -> Scores:
    """Return the scores of this program on these rows, from disk or from memory."""
    said = (
        f"{FORMAT} {program.name} {fingerprint(program.weights)} {data_digest(calls)} {workload} "
        f"{sorted(statistics.identity.items())}"
    )
    key = hashlib.sha256(said.encode()).hexdigest()[:NAMED]
    if place is not None:
        return Scores(place / f"scores-{key}.jsonl")
    held: dict[str, Any] = statistics.memo.setdefault(f"scores/{key}", {})
    return Scores(held=held)


def _budgeted(program: Program, goal: Mapping[str, float], terms: Terms) -> list[Plan]:
    """Return the plan that removes the same share everywhere, to the last neuron of the budget."""
    if tuple(budgets_of(goal)) != ("params",) or terms.rules or terms.tensor_parallel > 1:
        return []
    from attnopt.planning import fewer_parameters

    try:
        options = fewer_parameters(program, goal["params"], terms.passes or None)
    except NothingToDoError as error:
        debug.log(4, f"no uniform plan: {error}")
        return []
    return [Plan(tuple(o.choice for o in options))]


def _provenance(found: Found, lister: Lister) -> dict[str, Any]:
    """Return what a plan says of its search, the same in every run."""
    told = {name: round(share, 6) for name, share in _left(found).items()}
    return {
        "tier": lister.asked.tier,
        "tokens": lister.asked.tokens,
        "chosen": found.best.name,
        "left": told,
        "predicted": {
            "excess": round(found.best.cost, 6),
            "error": round(found.best.error, 6),
            "added": round(found.best.added, 6),
            "unit": found.unit,
        },
    }


def _left(found: Found) -> dict[str, float]:
    pairs = zip(found.goals, found.best.weights, strict=False)
    return {name: weight / found.weights[name] for name, weight in pairs if name in BUDGETS}
