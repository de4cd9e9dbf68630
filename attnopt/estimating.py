"""What a run will take, told before it: time by stage, the most memory at once, the disk it fills.

Disk follows from the shapes of tensors. Time is a short probe (`attnopt.probing`) times how often
the stages do the same; memory is what the process holds now, and the most that a stage adds to it.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attnopt.data import Split, batches_of
from attnopt.nouns import Mlp, No, Plan, Site
from attnopt.probing import Probe, available, resident, rows_in
from attnopt.program import Program
from attnopt.search.measuring import FIRST, SECOND
from attnopt.sizing import Reader, Rewrite, elements
from attnopt.weights import LARGEST

if TYPE_CHECKING:
    from attnopt.search.foreseeing import Looks

# How many times the copy of a graph takes what a stage does with graphs.
_GRAPHS: Final = {"plan": 2.0, "rewrite": 6.0, "verify": 8.0, "measure": 12.0, "save": 4.0}
# The same for carrying out a plan at one site, and making it ready to run.
_CARRIED_OUT: Final = 4.0
# Numbers of a softmax that the comparison of two logits costs, and logits held at once.
_COMPARED: Final = 12.0
_LOGITS: Final = 2**26
_HELD_LOGITS: Final = 7
# Products of n x n matrices that solving for n inputs takes.
_SOLVED: Final = 3.0
_SAMPLED: Final = 32
_WRITTEN: Final = 2.0e8
# An estimate that is off by less than this refuses nothing.
_CLEARLY: Final = 1.25


class TooLargeError(Exception):
    """A run that this machine has clearly no room for."""


@dataclass(frozen=True)
class Estimate:
    """Seconds by stage, and bytes: of memory at once, and of disk."""

    seconds: Mapping[str, float]
    memory: int
    disk: int

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return (
            f"about {told_time(self.total)}, {told_size(self.memory)} of memory, "
            f"{told_size(self.disk)} of disk"
        )

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        seconds = {name: round(s, 3) for name, s in self.seconds.items()}
        return {"seconds": seconds, "memory": self.memory, "disk": self.disk}


def estimate(
    program: Program,
    split: Split,
    goal: Mapping[str, float] | None = None,
    plan: Plan | None = None,
    *,
    searched: bool = False,
    looks: "Looks | None" = None,
) -> Estimate | No:
    """Estimate what it takes to optimize an exact program for a goal, or as a plan says.

    A plan that is `searched` is what the search will find as far as is known; `looks` counts what
    it will look at where every pass is measured at every site.
    """
    if set(program.parts) - {"encode", "decode"}:
        return No("it was captured in parts, of which no single run can be timed", program.name)
    return _Run.of(program, split, goal or {}, plan, searched, looks).estimate()


def refuse_too_large(expected: Estimate, out: Path | None) -> None:
    """Raise TooLargeError where memory or disk are clearly too small."""
    more, room = expected.memory - resident(), available()
    if room is not None and more > _CLEARLY * room:
        raise TooLargeError(
            f"about {told_size(expected.memory)} of memory are needed, and {told_size(room)} are "
            "free here; take fewer or shorter rows (--data NAME:16x128), or a larger machine"
        )
    free = math.inf if out is None else free_at(out)
    if expected.disk > _CLEARLY * free:
        raise TooLargeError(
            f"{out} will take about {told_size(expected.disk)}, and {told_size(free)} are free "
            "there; choose another disk"
        )


def free_at(place: Path) -> int:
    """Return the bytes that are free where something is to lie."""
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


@dataclass(frozen=True)
class _Run:
    """One run: what is rewritten, on how much data, and what a probe says."""

    rewrite: Rewrite
    searched: bool
    looks: "Looks | None"
    probe: Probe
    rows: tuple[int, int]
    calls: tuple[int, int]
    batch: int

    @classmethod
    def of(
        cls,
        program: Program,
        split: Split,
        goal: Mapping[str, float],
        plan: Plan | None,
        searched: bool,
        looks: "Looks | None",
    ) -> "_Run":
        """Count the data, and take the probe."""
        main = program.main
        both = [list(batches_of(main, half)) for half in (split.calibration, split.held_out)]
        rewrite = Rewrite(program, goal, plan)
        parameters = [p.parameter for t in rewrite.things for p in _read_by(t)]
        return cls(
            rewrite,
            searched or plan is None,
            looks,
            Probe.of(main, both[0][0], parameters),
            tuple(sum(map(rows_in, calls)) for calls in both),  # type: ignore[arg-type]
            (len(both[0]), len(both[1])),
            max(map(rows_in, (*both[0], *both[1]))),
        )

    def estimate(self) -> Estimate:
        """Add everything up."""
        return Estimate(dict(self._seconds()), self._memory(), self._disk())

    def _seconds(self) -> Iterator[tuple[str, float]]:
        probe, (rows, held) = self.probe, self.rows
        run = self.calls[0] * probe.call + rows * probe.row
        whole = [c * probe.whole_call + n * probe.whole_row
                 for c, n in zip(self.calls, self.rows, strict=True)]  # fmt: skip
        graphs = {stage: times * probe.copy for stage, times in _GRAPHS.items()}
        gathered = sum(self._gathered(name, width) for name, width in probe.widths.items())
        solved = sum(_SOLVED * size.width**3 for size in self.rewrite.refitted) * probe.multiply
        given = solved if self.searched else 0.0
        refits = sum(map(self._refit, self.rewrite.refitted))
        again = 2 * run if self.rewrite.refitted else 0.0
        looked = self._looked(solved + again + refits)
        yield "plan", graphs["plan"] + run + gathered + given + looked
        yield "rewrite", graphs["rewrite"] + solved + again + refits
        compared = _COMPARED * probe.touch * held * probe.results / 4
        yield "verify", graphs["verify"] + 2 * whole[1] + compared + 4 * probe.whole_call
        steps = _SAMPLED if self.rewrite.program.generates else 0
        yield "measure", graphs["measure"] + (6 + steps) * probe.whole_call
        yield "save", graphs["save"] + self._disk() / _WRITTEN

    def _looked(self, refitted: float) -> float:
        """Return the seconds that the looks of a search take; a whole plan is refitted, too."""
        looks = self.looks
        if looks is None:
            return 0.0
        carried = _CARRIED_OUT * self.probe.copy
        first = carried + self._judged(FIRST)
        second = carried + self._judged(SECOND)
        whole = carried + refitted + self._judged(looks.rows)
        return looks.first * first + looks.second * second + looks.whole * whole

    def _judged(self, rows: int) -> float:
        """Return the seconds that a look at so many rows takes, with the source's kept."""
        probe = self.probe
        compared = _COMPARED * probe.touch * rows * probe.results / 4
        return probe.whole_call + rows * probe.whole_row + compared

    def _gathered(self, name: str, width: int) -> float:
        """Return the seconds that the sums of one input take."""
        count = self.probe.moments[name] * self.rows[0]
        moments = count * (width + 1) ** 2 if count > width else 0.0
        return moments * self.probe.multiply + count * width * self.probe.touch

    def _refit(self, size: Reader) -> float:
        """Return the seconds that the refit of one projection takes."""
        count = self._count(size.name)
        sums = count * size.left * (size.left + size.width + size.outputs)
        solve = 2 * (size.left**3 / 3 + size.left**2 * size.outputs)
        return (sums + solve) * self.probe.multiply

    def _count(self, name: str) -> float:
        """Return the rows of numbers that calibration gives a projection."""
        known = self.probe.moments
        return known.get(name, max(known.values(), default=0.0)) * self.rows[0]

    def _memory(self) -> int:
        """Return what is held now, what stays until the end, and the most that a stage adds."""
        probe, rows = self.probe, self.rows[0]
        kept = min(self._statistics(), LARGEST)
        wide = 4 * elements(self.rewrite.program.main)
        call = probe.most * self.batch
        waiting = 2 * probe.held * rows
        held = min(self.batch, max(_LOGITS / max(probe.results / 4, 1), 1)) * probe.results
        wider = max((self._doubled(size) for size in self.rewrite.refitted), default=0.0)
        stages = (
            waiting / 2 + call,
            waiting + call + wider,
            2 * wide + call + _HELD_LOGITS * held,
        )
        return round(resident() + kept + max(stages))

    def _doubled(self, size: Reader) -> float:
        """Return the bytes of a call's rows in float64, before and after, as a refit holds them."""
        count = self._count(size.name) * self.batch / max(self.rows[0], 1)
        return 8 * count * (size.left + 2 * (size.width + size.outputs))

    def _statistics(self) -> int:
        """Return the bytes of statistics.safetensors."""
        total = 0.0
        for name, width in self.probe.widths.items():
            count = self._count(name)
            total += 4 * count * width if count <= width else 8 * (width + 1) ** 2
            total += 8 * width
        total += sum(8 * s.heads for s in self.rewrite.things if isinstance(s, Site))
        total += sum(8 * r.left * (r.left + r.width + r.outputs) for r in self.rewrite.refitted)
        return round(total)

    def _disk(self) -> int:
        """Return the bytes of the artifact."""
        return self.rewrite.artifact_bytes(self._statistics())


def _read_by(thing: Site | Mlp) -> list[Any]:
    """Return the projections whose inputs calibration looks at."""
    return [thing.down] if isinstance(thing, Mlp) else list(thing.projections.values())


def told_time(seconds: float) -> str:
    """Say a time for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def told_size(size: float) -> str:
    """Say a size for people."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1024:,.0f} KiB"
