"""Listing: every candidate of a site, weighed and looked at; what is declined, with the reason."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from attnopt import passes as registry
from attnopt.nouns import Mlp, No, Site
from attnopt.search.candidates import Asked, Candidate, Step, following, steps_at
from attnopt.search.judging import Look, rate_of
from attnopt.search.measuring import Measuring, Weighed
from attnopt.search.rules import Rule
from attnopt.search.solving import Scored

# Candidates of a site that another pass may follow, what is tried after each of them, and those
# that are looked at twice.
FOLLOWED: Final = 6
FOLLOWERS: Final = 4
FINALISTS: Final = 12
_MARGIN: Final = 1.25
_NEAR: Final = 1.5

# A site, and what passes are asked of it.
_Place = tuple[Site | Mlp, Asked]


@dataclass(frozen=True)
class Listed:
    """The candidates of a site after a first look, and what was declined there."""

    thing: Site | Mlp
    weighed: tuple[Weighed, ...]
    refused: tuple[No, ...]


@dataclass(frozen=True)
class Lister:
    """Lists candidates for what is asked, among some passes, by the user's rules."""

    asked: Asked
    measuring: Measuring
    names: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    tensor_parallel: int = 1

    def listed(self, thing: Site | Mlp) -> Listed:
        """List the candidates of a site: every pass alone, then those that may follow the best."""
        refused: list[No] = []
        steps = self._steps(Candidate(thing.name), lambda: (thing, self.asked), refused)
        alone = self._weighed(thing, [Candidate(thing.name, (s,)) for s in steps], refused)
        both: list[Candidate] = []
        for first in self._followed(alone):
            both += self._followers(thing, first, refused)
        together = self._weighed(thing, both, refused)
        return Listed(thing, (*alone, *together), tuple(dict.fromkeys(refused)))

    def _steps(
        self, before: Candidate, place: Callable[[], _Place | None], refused: list[No]
    ) -> list[Step]:
        """Ask the passes, once: what they say of a site follows from the program and the data.

        `place` makes what they are asked about, where that is not known yet.
        """
        after = before.steps[-1].rewrite if before.steps else None
        names = self.names if after is None else following(after, self.names)

        def make() -> Any:
            found = place()
            if found is None:
                return [], []
            steps, declined = steps_at(*found, names, self.rules)
            return [[s.rewrite, s.settings] for s in steps], [[n.why, n.where] for n in declined]

        asked = self.asked
        said = [names, asked.goals, asked.tier, asked.tokens, [repr(r) for r in self.rules]]
        name = f"steps {before.key} {json.dumps(said)}"
        steps, declined = self.measuring.scores.get(name, make)
        refused += [No(*told) for told in declined]
        modules: dict[str, Any] = {n: registry.load(n) for n, _ in steps}
        return [Step(n, modules[n].Config(**config)) for n, config in steps]

    def _weighed(
        self, thing: Site | Mlp, candidates: Sequence[Candidate], refused: list[No]
    ) -> list[Weighed]:
        found: list[Weighed] = []
        source = self.measuring.source(self.asked.goals)
        for candidate in candidates:
            weighed = self.measuring.first(candidate, self.asked.goals)
            answer = weighed if isinstance(weighed, str) else self._worth(thing, weighed, source)
            if isinstance(answer, str):
                refused.append(No(f"{candidate.label}: {answer}", thing.name))
            elif isinstance(weighed, Weighed) and answer:
                found.append(weighed)
        return found

    def _worth(
        self, thing: Site | Mlp, weighed: Weighed, source: Mapping[str, float]
    ) -> bool | str:
        """Say whether a candidate saves anything, or why it must not be taken."""
        unknown = [n for n, w in weighed.weights.items() if w is None]
        if unknown:
            return f"its {unknown[0]} cannot be counted"
        if weighed.look.divergence != weighed.look.divergence:
            return "its results are no numbers"
        if self.tensor_parallel > 1:
            uneven = self._uneven(thing, weighed.candidate)
            if uneven:
                return uneven
        return any(float(w or 0) < source[n] * (1 - 1e-12) for n, w in weighed.weights.items())

    def _uneven(self, thing: Site | Mlp, candidate: Candidate) -> str | None:
        """Say what does not divide among the devices of tensor parallelism."""
        count = self.tensor_parallel
        if isinstance(thing, Mlp):
            left = thing.neurons - sum(getattr(s.config, "neurons", 0) for s in candidate.steps)
            return f"{left} neurons do not divide among {count} devices" if left % count else None
        for queries, keys in self.measuring.heads(candidate, thing.module):
            if queries % count:
                return f"{queries} heads do not divide among {count} devices"
            if keys % count and count % keys:
                return f"{keys} key heads do not divide among {count} devices"
        return None

    def _followed(self, alone: Sequence[Weighed]) -> list[Weighed]:
        """Choose a few of the best that another pass may follow."""
        best = best_of(alone, self.asked.goals[0], margin=_NEAR)
        return spread([w for w in best if following(w.candidate.label, self.names)], FOLLOWED)

    def _followers(self, thing: Site | Mlp, first: Weighed, refused: list[No]) -> list[Candidate]:
        """List what may follow a candidate, asked of the site that it leaves."""
        if isinstance(thing, Mlp):
            return []
        steps = self._steps(first.candidate, lambda: self._after(thing, first.candidate), refused)
        return [first.candidate.then(s) for s in spread(steps, FOLLOWERS)]

    def _after(self, thing: Site, first: Candidate) -> _Place | None:
        """Return a site as a candidate leaves it, and what passes are asked of it."""
        made = self.measuring.alone(first)
        if isinstance(made, str):
            return None
        main = made.main
        site = next((s for s in main.sites if s.name == thing.name), None)
        if site is None:
            return None
        seen = replace(self.measuring.statistics, weights=main.weights, memo={})
        before = tuple(s.rewrite for s in first.steps)
        return site, replace(self.asked, program=main, statistics=seen, before=before)


def scored(
    listed: Sequence[Listed], measuring: Measuring, goals: Sequence[str]
) -> list[list[Scored]]:
    """Give every candidate its damage: the best of each site are looked at twice.

    What was looked at once only is judged by its distance from the source, at the rate at which
    the others pay for theirs.
    """
    looks: dict[str, Look] = {}
    for item in listed:
        for weighed in finalists(item.weighed, goals):
            looks[weighed.candidate.key] = measuring.second(weighed.candidate)
    rate = rate_of(list(looks.values()))
    source = measuring.source(goals)
    whole = tuple(source[n] / len(listed) for n in goals)
    rows: list[list[Scored]] = []
    for item in listed:
        row = [Scored(Candidate(item.thing.name), whole, 0.0)]
        for weighed in item.weighed:
            look = looks.get(weighed.candidate.key)
            told = [(n, weighed.weights[n]) for n in goals]
            weights = tuple(
                w + float(x or 0) - source[n] for w, (n, x) in zip(whole, told, strict=True)
            )
            damage = look.cost(rate) if look else rate * weighed.look.divergence
            row.append(Scored(weighed.candidate, weights, damage))
        rows.append(row)
    return rows


def finalists(weighed: Sequence[Weighed], goals: Sequence[str]) -> list[Weighed]:
    """Choose the candidates of a site that could be the best for some budget."""
    found: dict[str, Weighed] = {}
    for goal in goals:
        for one in spread(best_of(weighed, goal, margin=_MARGIN), FINALISTS):
            found[one.candidate.key] = one
    return list(found.values())


def best_of(weighed: Sequence[Weighed], goal: str, *, margin: float) -> list[Weighed]:
    """List what nothing lighter beats by more than the margin, the lightest last."""
    order = sorted(weighed, key=lambda w: (float(w.weights[goal] or 0), w.look.divergence))
    found: list[Weighed] = []
    least = float("inf")
    for one in order:
        if one.look.divergence <= margin * least:
            found.append(one)
        least = min(least, one.look.divergence)
    return found[::-1]


T = TypeVar("T")


def spread(weighed: Sequence[T], most: int) -> list[T]:
    """Take so many, from the first to the last."""
    if len(weighed) <= most:
        return list(weighed)
    places = {round(i * (len(weighed) - 1) / (most - 1)) for i in range(most)}
    return [weighed[i] for i in sorted(places)]
