"""What a run will take, told before it: time by stage, the most memory at once, the disk it fills.

Disk follows from the shapes of tensors. Time is a short probe (`attnopt.probing`) times how often
the stages do the same; memory is what the process holds now, and the most that a stage adds to it.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from attnopt.data import Split, batches_of
from attnopt.heads import removable
from attnopt.nouns import Mlp, No, Plan, Site
from attnopt.probing import Probe, available, resident, rows_in
from attnopt.program import Program
from attnopt.weights import LARGEST, described

# How many times the copy of a graph takes what a stage does with graphs.
_GRAPHS: Final = {"plan": 2.0, "rewrite": 6.0, "verify": 8.0, "measure": 12.0, "save": 4.0}
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
    looks: int = 0,
) -> Estimate | No:
    """Estimate what it takes to optimize an exact program for a goal, or as a plan says.

    A plan that is `searched` is what the search will find as far as is known; `looks` counts the
    rewrites that it will judge on all calibration rows.
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

    program: Program
    goal: Mapping[str, float]
    plan: Plan | None
    searched: bool
    looks: int
    probe: Probe
    rows: tuple[int, int]
    calls: tuple[int, int]
    batch: int
    things: tuple[Site | Mlp, ...]

    @classmethod
    def of(
        cls,
        program: Program,
        split: Split,
        goal: Mapping[str, float],
        plan: Plan | None,
        searched: bool,
        looks: int,
    ) -> "_Run":
        """Count the data, and take the probe."""
        main = program.main
        both = [list(batches_of(main, half)) for half in (split.calibration, split.held_out)]
        things: tuple[Site | Mlp, ...] = (*main.sites, *main.mlps)
        parameters = [p.parameter for t in things for p in _read_by(t)]
        return cls(
            program,
            goal,
            plan,
            searched or plan is None,
            looks,
            Probe.of(main, both[0][0], parameters),
            tuple(sum(map(rows_in, calls)) for calls in both),  # type: ignore[arg-type]
            (len(both[0]), len(both[1])),
            max(map(rows_in, (*both[0], *both[1]))),
            things,
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
        solved = sum(_SOLVED * size.width**3 for size in self._refitted()) * probe.multiply
        given = solved + self.looks * whole[0] if self.searched else 0.0
        yield "plan", graphs["plan"] + run + gathered + given
        refits = sum(map(self._refit, self._refitted()))
        again = 2 * run if self._refitted() else 0.0
        yield "rewrite", graphs["rewrite"] + solved + again + refits
        compared = _COMPARED * probe.touch * held * probe.results / 4
        yield "verify", graphs["verify"] + 2 * whole[1] + compared + 4 * probe.whole_call
        steps = _SAMPLED if self.program.generates else 0
        yield "measure", graphs["measure"] + (6 + steps) * probe.whole_call
        yield "save", graphs["save"] + self._disk() / _WRITTEN

    def _gathered(self, name: str, width: int) -> float:
        """Return the seconds that the sums of one input take."""
        count = self.probe.moments[name] * self.rows[0]
        moments = count * (width + 1) ** 2 if count > width else 0.0
        return moments * self.probe.multiply + count * width * self.probe.touch

    def _refit(self, size: "_Reader") -> float:
        """Return the seconds that the refit of one projection takes."""
        count = self._count(size.name)
        sums = count * size.left * (size.left + size.width + size.outputs)
        solve = 2 * (size.left**3 / 3 + size.left**2 * size.outputs)
        return (sums + solve) * self.probe.multiply

    def _count(self, name: str) -> float:
        """Return the rows of numbers that calibration gives a projection."""
        known = self.probe.moments
        return known.get(name, max(known.values(), default=0.0)) * self.rows[0]

    def _refitted(self) -> list["_Reader"]:
        """List the projections that are solved anew, by the goal or by the plan."""
        weights = self.program.main.weights
        chosen = None if self.plan is None else {c.site: dict(c.config) for c in self.plan.choices}
        found: list[_Reader] = []
        for thing in self.things:
            last = thing.down if isinstance(thing, Mlp) else thing.projections.get("o")
            if last is None:
                continue
            left = self._left(thing) if chosen is None else _left_by(thing, chosen.get(thing.name))
            if left is None:
                continue
            shape = described(weights, last.parameter).shape
            width = shape[last.axis]
            found.append(
                _Reader(last.parameter, width, round(left * width), math.prod(shape) // width)
            )
        return found

    def _left(self, thing: Site | Mlp) -> float | None:
        """Return the share of a projection's inputs that a goal leaves; None where it stays."""
        if "params" in self.goal:
            return 1 - (1 - self.goal["params"]) / max(self._removable_share(), 1e-9)
        if "kv_cache" in self.goal and isinstance(thing, Site) and thing.cached:
            return 1.0
        return None

    def _removable_share(self) -> float:
        main = self.program.main
        sizes = [removable(thing, main.weights) for thing in self.things]
        return sum(unit * count for unit, count in sizes) / max(_elements(main), 1)

    def _memory(self) -> int:
        """Return what is held now, what stays until the end, and the most that a stage adds."""
        probe, rows = self.probe, self.rows[0]
        kept = min(self._statistics(), LARGEST)
        wide = 4 * _elements(self.program.main)
        call = probe.most * self.batch
        waiting = 2 * probe.held * rows
        held = min(self.batch, max(_LOGITS / max(probe.results / 4, 1), 1)) * probe.results
        wider = max((self._doubled(size) for size in self._refitted()), default=0.0)
        stages = (
            waiting / 2 + call,
            waiting + call + wider,
            2 * wide + call + _HELD_LOGITS * held,
        )
        return round(resident() + kept + max(stages))

    def _doubled(self, size: "_Reader") -> float:
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
        total += sum(8 * s.heads for s in self.things if isinstance(s, Site))
        total += sum(8 * r.left * (r.left + r.width + r.outputs) for r in self._refitted())
        return round(total)

    def _disk(self) -> int:
        """Return the bytes of the artifact."""
        from attnopt.artifacts.saving import source_folder

        folder = source_folder(self.program)
        if folder is None:
            weights = float(_bytes(self.program))
            others = 0
        else:
            sizes = {p: p.stat().st_size for p in folder.iterdir() if p.is_file()}
            weights = float(sum(n for p, n in sizes.items() if p.suffix == ".safetensors"))
            others = sum(n for p, n in sizes.items() if p.name.startswith(_CARRIED))
        count = len(self.things)
        words = _WORDS + _WORDS_A_PLACE * count
        return round(weights - self._removed_bytes() + self._statistics() + others + words)

    def _removed_bytes(self) -> float:
        """Return the bytes of weights that go."""
        main = self.program.main
        size = _bytes(main) / max(_elements(main), 1)
        if self.plan is not None:
            chosen = {c.site: dict(c.config) for c in self.plan.choices}
            return size * sum(_removed(t, chosen.get(t.name), main) for t in self.things)
        if "params" in self.goal:
            return size * (1 - self.goal["params"]) * _elements(main)
        if "kv_cache" in self.goal:
            cached = [s for s in self.things if isinstance(s, Site) and s.cached]
            keys = sum(_rows_size(s, n, main) for s in cached for n in ("k", "v"))
            return size * (1 - self.goal["kv_cache"]) * keys
        return 0.0


_CARRIED: Final = ("token", "vocab", "merges", "special", "added", "chat", "generation", "prepro")
_WORDS, _WORDS_A_PLACE = 12_000, 2_800


@dataclass(frozen=True)
class _Reader:
    """A projection that is solved anew: its inputs before and after, and its outputs."""

    name: str
    width: int
    left: int
    outputs: int


def _read_by(thing: Site | Mlp) -> list[Any]:
    """Return the projections whose inputs calibration looks at."""
    return [thing.down] if isinstance(thing, Mlp) else list(thing.projections.values())


def _left_by(thing: Site | Mlp, config: Mapping[str, Any] | None) -> float | None:
    """Return the share of a projection's inputs that a choice leaves; None where it stays."""
    if not config or not config.get("refit"):
        return None
    units = thing.neurons if isinstance(thing, Mlp) else thing.kv_heads
    gone = config.get("neurons", 0) if isinstance(thing, Mlp) else config.get("groups", 0)
    return 1 - float(gone) / units


def _removed(thing: Site | Mlp, config: Mapping[str, Any] | None, main: Program) -> float:
    """Return how many weights a choice removes."""
    if not config:
        return 0.0
    if "kv_heads" in config and isinstance(thing, Site):
        left = {n: config.get(f"{n}_heads") or config["kv_heads"] for n in ("k", "v")}
        sizes = {n: _rows_size(thing, n, main) for n in left}
        return float(sum(sizes[n] * (1 - left[n] / thing.kv_heads) for n in left))
    unit, _ = removable(thing, main.weights)
    return float(unit * (config.get("groups", 0) + config.get("neurons", 0)))


def _rows_size(site: Site, name: str, main: Program) -> float:
    """Return the weights of one projection of a site."""
    projection = site.projections.get(name)
    if projection is None:
        return 0.0
    shape = described(main.weights, projection.parameter).shape
    rows = len(projection.rows) * len(projection.rows[0])
    return rows * math.prod(shape) / shape[projection.axis]


def _names(program: Program) -> list[str]:
    """List the parameters, those that are tied once."""
    twins = {name: group[0] for group in program.source.tied for name in group}
    parts = (program, *program.parts.values())
    bound = {b.name for p in parts for b in p.bindings.values() if b.kind == "parameter"}
    return sorted({twins.get(name, name): name for name in sorted(bound)}.values())


def _elements(program: Program) -> int:
    return sum(math.prod(described(program.weights, n).shape) for n in _names(program))


def _bytes(program: Program) -> int:
    return sum(described(program.weights, n).bytes for n in _names(program))


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
