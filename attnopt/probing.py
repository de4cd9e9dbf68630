"""A short look at how fast a model runs here, and at what it keeps on the way.

The program is run on one row and on a few, node by node, as calibration does it; what the runs hold
is weighed after every node. A product and a softmax say how fast this machine is. All is timed
for a while: a machine with other work is slow in spells, and a long run meets them as they come.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnopt.calibrating import inputs_of, kept_tokens, rows_of
from attnopt.program import Program
from attnopt.running import Run

_FEW: Final = 4
# As large as the products of a solve: threads that wait for each other cost little beside it.
_SIDE: Final = 768
_NUMBERS: Final = 2**20
# Seconds that something is timed for, and how often at least and at most.
_WHILE: Final = 0.4
_LEAST: Final = 3
_MOST: Final = 16


@dataclass(frozen=True)
class Probe:
    """Seconds and bytes of one call: `call` whatever its rows, `row` for each of them.

    `whole` adds what follows the last site. `copy` are the seconds that a copy of the graph takes,
    `multiply` those of a multiply-add in float64, `touch` those of one number of a softmax. `held`
    are the bytes of a row that wait between layers, `most` the most that it has at once, `moments`
    the rows of numbers that each input of a projection gives for a row of data.
    """

    call: float
    row: float
    whole_call: float
    whole_row: float
    copy: float
    multiply: float
    touch: float
    held: float
    most: float
    results: float
    moments: Mapping[str, float]
    widths: Mapping[str, int]

    @classmethod
    def of(cls, program: Program, batch: Mapping[str, Any], parameters: list[str]) -> "Probe":
        """Run a program on some rows of a batch, with a look at the inputs of some parameters."""
        copied = _time(lambda: program.cast(torch.float32))
        wide = program.cast(torch.float32)
        inputs = inputs_of(wide, parameters)
        count = min(_FEW, rows_in(batch))
        one, few = _watched(wide, [first_rows(batch, n) for n in (1, count)], inputs)
        more = max(count - 1, 1)
        row, whole_row = (
            max(b - a, 0.0) / more if count > 1 else a
            for a, b in ((one.seconds, few.seconds), (one.whole, few.whole))
        )
        return cls(
            max(one.seconds - row, 0.0),
            row,
            max(one.whole - whole_row, 0.0),
            whole_row,
            copied,
            _product_seconds(),
            _softmax_seconds(),
            few.held / count,
            few.most / count,
            few.results / count,
            {name: n / count for name, n in few.moments.items()},
            {name: int(node.meta["val"].shape[-1]) for name, node in few.owners.items()},
        )


def _watched(
    program: Program, calls: Sequence[Mapping[str, Any]], inputs: Mapping[str, fx.Node]
) -> "list[_Watched]":
    """Run calls in turn for a while, and return the last run of each, with the mean times."""
    _Watched(program, calls[0], inputs).finish()
    rounds: list[list[_Watched]] = []
    start = time.perf_counter()
    while not rounds or (time.perf_counter() - start < _WHILE and len(rounds) < _MOST):
        rounds.append([_Watched(program, call, inputs) for call in calls])
        for run in rounds[-1]:
            run.finish()
            run.forget()
    for last, runs in zip(rounds[-1], zip(*rounds, strict=True), strict=True):
        last.seconds = fmean(run.seconds for run in runs)
        last.whole = fmean(run.whole for run in runs)
    return rounds[-1]


class _Watched(Run):
    """A run that is timed and weighed."""

    def __init__(
        self, program: Program, batch: Mapping[str, Any], inputs: Mapping[str, fx.Node]
    ) -> None:
        super().__init__(program, batch)
        self.batch = batch
        self.owners: dict[str, fx.Node] = {}
        for name, node in inputs.items():
            if node not in self.owners.values():
                self.owners[name] = node
        self.moments: dict[str, int] = {}
        self.seconds = self.whole = 0.0
        self.held = self.most = self.results = 0.0

    def finish(self) -> None:
        """Run to the end; what waits between layers is weighed in the middle."""
        kept, names = kept_tokens(self.batch), {node: n for n, node in self.owners.items()}
        middle = list(self.owners.values())[len(self.owners) // 2 :][:1]
        start = time.perf_counter()
        for node, value in self.seen(names):
            self.moments[names[node]] = len(rows_of(value, kept))
            if node in middle:
                self.held = float(self._weight())
        self.seconds = time.perf_counter() - start
        (output,) = self.program.graph.find_nodes(op="output")
        result = self.until(output)
        self.whole = time.perf_counter() - start
        tensors = [t for t in result if isinstance(t, Tensor)]
        self.results = float(tensors[0].nbytes) if tensors else 0.0

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and weigh what is there after it."""
        result = super().run_node(n)
        if n.op == "call_function":
            self.most = max(self.most, float(self._weight()))
        return result

    def _weight(self) -> int:
        found = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in self.env.values()
            if isinstance(value, Tensor)
        }
        return sum(found.values())


def rows_in(batch: Mapping[str, Any]) -> int:
    """Return the rows of a call."""
    counts = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    return max(counts, default=1)


def first_rows(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the first rows of a call."""
    whole = rows_in(batch)
    return {
        name: v[:count] if isinstance(v, Tensor) and v.dim() and len(v) == whole else v
        for name, v in batch.items()
    }


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _mean(work: Callable[[], object]) -> float:
    """Return the mean seconds of some work over a while, without the first time."""
    work()
    spent: list[float] = []
    while len(spent) < _LEAST or sum(spent) < _WHILE:
        spent.append(_time(work))
    return fmean(spent)


def _product_seconds() -> float:
    """Time a multiply-add of a product in float64."""
    a = torch.ones(_SIDE, _SIDE, dtype=torch.float64)
    return _mean(lambda: a @ a) / _SIDE**3


def _softmax_seconds() -> float:
    """Time one number of a softmax."""
    a = torch.ones(_NUMBERS // 1024, 1024)
    return _mean(lambda: a.log_softmax(-1)) / _NUMBERS


def resident() -> int:
    """Return the memory that this process has, in bytes."""
    place = Path("/proc/self/statm")
    if place.is_file():
        return int(place.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int | None:
    """Return the memory that this process can have more, in bytes; None where nobody says."""
    place = Path("/proc/meminfo")
    if not place.is_file():
        return None
    lines = dict(line.split(":", 1) for line in place.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text().strip() if limit.is_file() else "max"
    return min(free, int(told) - resident()) if told.isdecimal() else free
