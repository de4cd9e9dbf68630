"""Measuring: what each candidate weighs and spoils, alone at its site, and what whole plans do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from attnopt.costs import Workload
from attnopt.moments import Refits, Statistics
from attnopt.nouns import Choice, Plan
from attnopt.program import Program
from attnopt.rewriting import apply
from attnopt.search.candidates import Candidate
from attnopt.search.clock import Clock
from attnopt.search.judging import Judge, Look
from attnopt.search.scores import Scores
from attnopt.search.weighing import flops_of, heads_of, weights_of
from attnopt.verifying.calling import Call

# Not all of torch says what it exports.
_Unsolvable: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# Rows, of all those that plans are judged on, for a first look and for a second one.
FIRST: Final = 4
SECOND: Final = 16


@dataclass(frozen=True)
class Weighed:
    """A candidate with the weights of the program that has it alone, and a first look at it."""

    candidate: Candidate
    weights: Mapping[str, float | None]
    look: Look


class Measuring:
    """Measures candidates and plans of one program on the same rows; every score is kept."""

    def __init__(
        self,
        program: Program,
        statistics: Statistics,
        calls: Sequence[Call],
        workload: Workload,
        scores: Scores,
    ) -> None:
        self.program = program
        self.statistics = statistics
        self.workload = workload
        self.scores = scores
        self._calls = calls
        self._judges: dict[int, Judge] = {}
        self._clock = Clock(scores, _first_rows(calls, 1)[0])
        # What passes keep that they work out of the source alone.
        self._of_source = Refits()
        self._refits: tuple[float, str, Refits] | None = None
        self._applied: tuple[str, Program] | None = None

    def judge(self, rows: int | None = None) -> Judge:
        """Return who judges on the first rows, or on all."""
        number = rows or 0
        if number not in self._judges:
            calls = self._calls if rows is None else _first_rows(self._calls, rows)
            self._judges[number] = Judge(self.program, calls)
        return self._judges[number]

    def source(self, names: Sequence[str]) -> dict[str, float]:
        """Return what the source weighs."""
        found = self.scores.get("source", lambda: weights_of(self.program, self.workload))
        told = self._told(found, names, "source", lambda: self.program)
        return {name: float(weight or 0.0) for name, weight in told.items()}

    def first(self, candidate: Candidate, names: Sequence[str]) -> Weighed | str:
        """Weigh a candidate and take a first look at it, or say why it cannot be carried out."""

        def make() -> Any:
            made = self.alone(candidate)
            if isinstance(made, str):
                return made
            look = self.judge(FIRST).look(made)
            return [weights_of(made, self.workload), look.content()]

        found = self.scores.get(f"first {candidate.key}", make)
        if isinstance(found, str):
            return found
        weights = self._told(found[0], names, candidate.key, lambda: self._must(candidate))
        return Weighed(candidate, weights, Look(*found[1]))

    def second(self, candidate: Candidate) -> Look:
        """Look at a candidate on more rows."""
        made = self.scores.get(
            f"second {candidate.key}",
            lambda: self.judge(SECOND).look(self._must(candidate)).content(),
        )
        return Look(*made)

    def unit(self) -> str:
        """Return what damage is counted in."""
        return str(self.scores.get("unit", lambda: self.judge().unit))

    def whole(self, choices: Sequence[Choice]) -> Look:
        """Look at a plan, carried out as it would be, on all rows."""

        name = _named(choices)

        def make() -> list[float]:
            made, refits = self._carried_out(choices)
            look = self.judge().look(made)
            # Moments are large: those of the best so far are kept, which may be asked for.
            if self._refits is None or look.cost(1.0) <= self._refits[0]:
                self._refits = look.cost(1.0), name, refits
            return look.content()

        return Look(*self.scores.get(f"whole {name}", make))

    def refits(self, choices: Sequence[Choice], known: Refits) -> Refits:
        """Return the moments that a plan is refitted with, so that it needs no data any more.

        `known` are those of them that an earlier process has left; it takes the others.
        """
        if self._refits is not None and self._refits[1] == _named(choices):
            return self._refits[2]
        return self._carried_out(choices, known)[1]

    def _carried_out(
        self, choices: Sequence[Choice], known: Refits | None = None
    ) -> tuple[Program, Refits]:
        statistics = self._fresh() if known is None else replace(self._fresh(), refits=known)
        made = apply(self.program, Plan(tuple(choices), statistics=statistics))
        return made, statistics.refits

    def heads(self, candidate: Candidate, module: str) -> list[tuple[int, int]]:
        """Return the heads of the ops that a candidate leaves at a site."""
        found = self.scores.get(
            f"heads {candidate.key}", lambda: list(heads_of(self._must(candidate), module))
        )
        return [(int(q), int(k)) for q, k in found]

    def alone(self, candidate: Candidate) -> Program | str:
        """Return the program with a candidate at its site, its projections not refitted."""
        if self._applied is not None and self._applied[0] == candidate.key:
            return self._applied[1]
        seen = self._fresh()
        if len(candidate.steps) == 1:
            seen = replace(seen, refits=self._of_source)
        plan = Plan(candidate.choices(refit=False), statistics=seen)
        try:
            made = apply(self.program, plan)
        except (ValueError, NotImplementedError, _Unsolvable) as error:
            return str(error)
        self._applied = candidate.key, made
        return made

    def _must(self, candidate: Candidate) -> Program:
        made = self.alone(candidate)
        if isinstance(made, str):
            raise ValueError(made)
        return made

    def _told(
        self,
        known: Mapping[str, float],
        names: Sequence[str],
        key: str,
        make: Callable[[], Program],
    ) -> dict[str, float | None]:
        """Return the weights that are asked for; those that take long are made only then."""
        slow: dict[str, Callable[[], float | None]] = {
            "flops": lambda: flops_of(make(), self.workload),
            "latency": lambda: self._clock.seconds(make()),
        }
        found: dict[str, float | None] = {}
        for name in names:
            made = slow.get(name)
            found[name] = self.scores.get(f"{name} {key}", made) if made else known[name]
        return found

    def _fresh(self) -> Statistics:
        """Return the statistics without what other plans have left in them."""
        return replace(self.statistics, memo={}, refits=Refits())


def _named(choices: Sequence[Choice]) -> str:
    return str([[c.site, c.rewrite, sorted(c.config.items())] for c in choices])


def _first_rows(calls: Sequence[Call], rows: int) -> list[dict[str, Any]]:
    """Return calls with so many rows in all."""
    found: list[dict[str, Any]] = []
    left = rows
    for call in calls:
        counts = {len(v) for v in call.values() if isinstance(v, torch.Tensor) and v.dim()}
        count = counts.pop() if len(counts) == 1 else 0
        found.append({n: v[:left] if count else v for n, v in call.items()})
        left -= count or rows
        if left <= 0:
            break
    return found
