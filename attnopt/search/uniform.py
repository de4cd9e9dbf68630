"""Uniform plans: one pass with one setting everywhere, which every plan has to beat."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnopt.nouns import Choice
from attnopt.search.solving import Scored

# Plans of one pass that are measured, from the weakest to the strongest.
MOST = 4


@dataclass(frozen=True)
class Uniform:
    """One pass at all sites of a kind that it fits, with one setting."""

    family: tuple[str, str]
    chosen: tuple[Scored, ...]
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        """What a table calls it: what it does at the first of the sites."""
        return f"{self.chosen[0].candidate.said} everywhere"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Return the plan's choices."""
        return tuple(c for s in self.chosen for c in s.candidate.choices("the same everywhere"))


def uniform_plans(
    rows: Mapping[str, Sequence[Scored]], kinds: Mapping[str, str]
) -> dict[tuple[str, str], list[Uniform]]:
    """List, for each pass and kind of site, its settings that all those sites can have.

    The strongest saving comes last. `rows` has the candidates of each site, staying as it is among
    them, whose weights say what the site takes now.
    """
    found: dict[tuple[str, str], dict[Hashable, dict[str, Scored]]] = {}
    for site, row in rows.items():
        for scored in row:
            if len(scored.candidate.steps) == 1:
                family = scored.candidate.label, kinds[site]
                levels = found.setdefault(family, {})
                levels.setdefault(scored.candidate.alike, {}).setdefault(site, scored)
    kept = {site: next(s for s in row if not s.candidate.steps) for site, row in rows.items()}
    plans: dict[tuple[str, str], list[Uniform]] = {}
    for family, levels in found.items():
        able = {site for level in levels.values() for site in level}
        whole = [level for level in levels.values() if set(level) == able]
        made = [_made(family, level, kept) for level in whole]
        plans[family] = sorted(made, key=lambda u: (-sum(u.weights), u.chosen[0].candidate.key))
    return plans


def _made(
    family: tuple[str, str], level: Mapping[str, Scored], kept: Mapping[str, Scored]
) -> Uniform:
    all_of = {**kept, **level}
    weights = tuple(sum(w) for w in zip(*(s.weights for s in all_of.values()), strict=True))
    return Uniform(family, tuple(level[s] for s in kept if s in level), weights)


def reaching(plans: Iterable[Uniform], budgets: Sequence[float]) -> list[Uniform]:
    """List the plans within all budgets, the one that saves least first."""
    return [
        u
        for u in plans
        if all(w <= b * (1 + 1e-9) for w, b in zip(u.weights, budgets, strict=True))
    ]


def thinned(plans: Sequence[Uniform]) -> list[Uniform]:
    """Take a few plans of one pass, from the weakest to the strongest."""
    if len(plans) <= MOST:
        return list(plans)
    places = {round(i * (len(plans) - 1) / (MOST - 1)) for i in range(MOST)}
    return [plans[i] for i in sorted(places)]
