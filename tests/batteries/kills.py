"""Kill -9 a save over an older artifact: what is there is wholly the old one or wholly the new one.

Moments are uniform over the time that a save takes. Beside them stand boundaries: just before the
n-th file operation of a save, with and without the system call that exchanges two directories.
"""

import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from subjects import TIERS, Subjects, digest, main, value_of, weight_files
from transformers import modeling_utils

from attnopt.artifacts import staging
from attnopt.artifacts.saving import Result

FULL: Final = 200
_OPERATIONS: Final = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_OLD, _NEW = 1.0, 2.0


@dataclass
class Target:
    """A directory that is saved to, and what it holds before and after."""

    subjects: Subjects
    tier: int
    out: Path
    old: Result
    new: Result
    digests: dict[str, float]

    @classmethod
    def of(cls, subjects: Subjects, tier: int) -> "Target":
        """Save both models once, to know what the whole of each is."""
        out = subjects.folder / f"tier{tier}" / "out"
        out.parent.mkdir(exist_ok=True)
        digests = {}
        for value in (_NEW, _OLD):
            digests[digest(subjects.artifact(tier, out, value))] = value
        old, new = (subjects.filled(tier, v) for v in (_OLD, _NEW))
        return cls(subjects, tier, out, old, new, digests)

    def save(self, result: Result) -> None:
        self.subjects.save(result, self.tier, self.out)

    def forked(self, prepare: Callable[[], None] | None = None) -> tuple[int, int]:
        """Save the new model in a child; return its number, and a pipe that tells start and end."""
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            return child, reading
        status = 1
        try:
            os.close(reading)
            if prepare is not None:
                prepare()
            os.write(writing, b"s")
            self.save(self.new)
            os.write(writing, b"e")
            status = 0
        finally:
            os._exit(status)

    def judged(self) -> tuple[str, str]:
        """Say which model is there, and in which phase the save was killed; tidy up."""
        left = [p for p in self.out.parent.iterdir() if p != self.out]
        if not self.out.exists():
            phase = "between two renames"
            value_of(self.out)
        elif not left:
            phase = "before" if self._which() == "old" else "after"
        elif self._which() == "new":
            phase = "cleaning"
        else:
            count = max(len(weight_files(p)) for p in left)
            phase = f"weights {count}" if not (left[0] / "README.md").exists() else "flushing"
        which = self._which()
        assert value_of(self.out) == {_OLD if which == "old" else _NEW}, "the tensors are mixed"
        self.save(self.old)
        left = [p.name for p in self.out.parent.iterdir() if p != self.out]
        assert not left, f"left behind: {left}"
        return which, phase

    def _which(self) -> str:
        value = self.digests.get(digest(self.out))
        assert value is not None, "a mixture of files"
        return "old" if value == _OLD else "new"

    def killed_after(self, seconds: float) -> tuple[str, str]:
        child, pipe = self.forked()
        assert os.read(pipe, 1) == b"s"
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return self._ended(child, pipe)

    def killed_before(self, number: int, *, exchange: bool) -> tuple[str, str]:
        child, pipe = self.forked(lambda: die_before(number, self.out.parent, exchange=exchange))
        return self._ended(child, pipe)

    def _ended(self, child: int, pipe: int) -> tuple[str, str]:
        os.waitpid(child, 0)
        os.close(pipe)
        return self.judged()

    def duration(self) -> float:
        """Return the seconds that a save takes in a child, from its start to its end."""
        taken = []
        for _ in range(5):
            child, pipe = self.forked()
            os.read(pipe, 1)
            start = time.perf_counter()
            os.read(pipe, 1)
            taken.append(time.perf_counter() - start)
            os.waitpid(child, 0)
            os.close(pipe)
            self.save(self.old)
        return statistics.median(taken)

    def operations(self, *, exchange: bool) -> int:
        """Count the file operations of a save."""
        reading, writing = os.pipe()
        child, pipe = self.forked(
            lambda: die_before(None, self.out.parent, exchange=exchange, told=writing)
        )
        os.close(writing)
        os.waitpid(child, 0)
        os.close(pipe)
        with os.fdopen(reading) as told:
            count = len(told.read())
        self.save(self.old)
        return count


def die_before(
    number: int | None, folder: Path, *, exchange: bool, told: int | None = None
) -> None:
    """Let this process kill itself before its n-th file operation below a folder."""
    seen = 0

    def operation() -> None:
        nonlocal seen
        seen += 1
        if told is not None:
            os.write(told, b".")
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OPERATIONS and str(arguments[0]).startswith(str(folder)):
            operation()

    sync, own = os.fsync, staging.exchange

    def fsync(handle: int) -> None:
        operation()
        sync(handle)

    def exchanged(a: Path, b: Path) -> bool:
        operation()
        return exchange and own(a, b)

    os.fsync = fsync
    staging.exchange = exchanged
    for home, name in ((safetensors.torch, "save_file"), (modeling_utils, "safe_save_file")):
        setattr(home, name, _preceded(operation, getattr(home, name)))
    sys.addaudithook(heard)


def _preceded(before: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return both


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Kill at so many moments, and in each tier and way of moving at a tenth as many boundaries."""
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    failures: list[str] = []

    def judge(target: Target, what: str, kill: Callable[..., tuple[str, str]], **how: Any) -> None:
        try:
            which, phase = kill(target, **how)
        except Exception as error:  # what a reader raises of what a kill left is a finding
            failures.append(f"{what}: {type(error).__name__}: {error}")
            shutil.rmtree(target.out.parent)
            target.out.parent.mkdir()
            target.save(target.old)
            return
        seen[f"{what.split()[0]} {which}"] += 1
        phases[f"{what.split()[0]} {phase}"] += 1

    boundaries = 0
    for tier in TIERS:
        target = Target.of(subjects, tier)
        whole = target.duration()
        for _ in range(points // 3 + (tier < points % 3)):
            moment = draw.uniform(0, 1.1 * whole)
            judge(
                target, f"moment {moment:.4f} of tier {tier}", Target.killed_after, seconds=moment
            )
        for exchange in (True, False):
            count = target.operations(exchange=exchange)
            for number in draw.sample(range(1, count + 1), min(max(points // 10, 1), count)):
                boundaries += 1
                what = f"boundary {number} of tier {tier}, exchange {exchange}"
                how = {"number": number, "exchange": exchange}
                judge(target, what, Target.killed_before, **how)
    during = sum(n for p, n in phases.items() if p.startswith("moment weights")) + sum(
        phases[f"moment {p}"] for p in ("flushing", "cleaning")
    )
    if points >= FULL // 10 and during < points // 5:
        failures.append(f"only {during} of {points} kills came during a save")
    return {
        "points": points,
        "during": during,
        "boundaries": boundaries,
        "seen": dict(sorted(seen.items())),
        "phases": dict(sorted(phases.items())),
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
