"""How often a search will look at a plan, told before anything is known of the data.

Every pass is asked what it would propose at every site; what is known of earlier searches is not
looked at again. Plans of several passes at one site, the rounds of corrections and the candidates
that deserve a second look are as many as there may be, so that a search rather takes less.
"""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from attnopt.data import Split, batches_of
from attnopt.goals import budgets_of
from attnopt.keeping import folder_of
from attnopt.nouns import Mlp, Site
from attnopt.probing import rows_in
from attnopt.program import Program
from attnopt.search.candidates import Asked, following, steps_at
from attnopt.search.listing import FINALISTS, FOLLOWED, FOLLOWERS
from attnopt.search.preparing import Terms, length_of, names_of
from attnopt.search.scores import names_in
from attnopt.search.searching import searched_things
from attnopt.search.uniform import MOST

# Rounds of corrections that a search mostly takes.
_ROUNDS: Final = 3


@dataclass(frozen=True)
class Looks:
    """How many plans are carried out: at one site, to be looked at once or twice, and whole.

    `rows` are those that a whole plan is judged on.
    """

    first: int
    second: int
    whole: int
    rows: int


def looks_of(
    program: Program,
    goal: Mapping[str, float],
    split: Split,
    terms: Terms,
    work: str | os.PathLike[str] | None = None,
) -> Looks:
    """Count the looks of a search; what scores in `work` tell is not looked at again."""
    goals, names = tuple(budgets_of(goal)), names_of(terms)
    given = split.calibration if split.scoring is None else split.scoring
    calls = list(batches_of(program, given, labels=True))
    seen = length_of(calls)
    asked = Asked(program, None, goals, terms.tier, terms.tokens or seen, seen)
    first = second = 0
    alike: dict[tuple[str, str], set[Hashable]] = {}
    for thing in searched_things(program.main, goals):
        steps = steps_at(thing, asked, names, terms.rules)[0]
        count = len(steps) + _together(thing, asked, names, terms)
        first += count
        second += min(FINALISTS * len(goals), count)
        for step in steps:
            family = (step.rewrite, type(thing).__name__)
            alike.setdefault(family, set()).add(step.alike)
    whole = sum(min(len(levels), MOST) for levels in alike.values())
    known = _known(work, program, split)
    made = [sum(n.startswith(f"{what} ") for n in known) for what in ("first", "second", "whole")]
    mixed = _ROUNDS if terms.tier else 0
    return Looks(
        max(first - made[0], 0),
        max(second - made[1], 0),
        max(whole - made[2], 0) + len(alike) + mixed,
        sum(map(rows_in, calls)),
    )


def _together(thing: Site | Mlp, asked: Asked, names: tuple[str, ...], terms: Terms) -> int:
    """Count the plans of two passes at one site."""
    if isinstance(thing, Mlp):
        return 0
    leading = [n for n in names if following(n, names)]
    followers = sorted({n for first in leading for n in following(first, names)})
    if not followers:
        return 0
    firsts = steps_at(thing, asked, leading, terms.rules)[0]
    after = steps_at(thing, replace(asked, before=(leading[0],)), followers, terms.rules)[0]
    return min(len(firsts), FOLLOWED) * min(len(after), FOLLOWERS)


def _known(work: str | os.PathLike[str] | None, program: Program, split: Split) -> list[str]:
    """List the scores that earlier searches of this program on this data have left."""
    if work is None:
        return []
    files = folder_of(work, program, split).glob("scores-*.jsonl")
    return [name for file in files for name in names_in(file)]
