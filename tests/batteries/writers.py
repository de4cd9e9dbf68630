"""Save to one directory from two processes or two threads at once, and read it meanwhile.

Each writer ends with a whole artifact there, its own or the other's, or with one clear error; a
reader gets one of both, or a clear error; nothing is left behind.
"""

import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from subjects import TIERS, Subjects, digest, main, value_of

FULL: Final = 200
_VALUES: Final = (1.0, 2.0)
_CLEAR: Final = (ValueError, FileNotFoundError)


class Pair:
    """Two writers of one directory, in one tier."""

    def __init__(self, subjects: Subjects, tier: int) -> None:
        self.out = subjects.folder / f"writers{tier}" / "out"
        self.out.parent.mkdir()
        self.digests = {digest(subjects.artifact(tier, self.out, v)): v for v in _VALUES}
        results = {v: subjects.filled(tier, v) for v in _VALUES}
        self.saves = [lambda v=v: subjects.save(results[v], tier, self.out) for v in _VALUES]

    def prepare(self, *, fresh: bool) -> None:
        """Leave the directory of the last round there, or none."""
        if fresh:
            shutil.rmtree(self.out, ignore_errors=True)

    def whole(self) -> float:
        """Return the value of the model that is there as a whole, and nothing beside it."""
        value = self.digests.get(digest(self.out))
        assert value is not None, "a mixture of files"
        left = sorted(p.name for p in self.out.parent.iterdir())
        assert left == ["out"], f"left behind: {left}"
        assert value_of(self.out) == {value}, "the tensors are mixed"
        return value


def in_threads(calls: list[Callable[[], None]]) -> list[str]:
    """Run calls at the same time in threads; return what each ended with."""
    barrier, ends = threading.Barrier(len(calls)), [""] * len(calls)

    def one(number: int) -> None:
        barrier.wait()
        ends[number] = ended(calls[number])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def in_processes(calls: list[Callable[[], None]]) -> list[str]:
    """Run calls at the same time in forked children; return what each ended with."""
    start = time.monotonic() + 0.02
    children = [forked(call, start) for call in calls]
    ends = []
    for child, pipe in children:
        with os.fdopen(pipe) as told:
            ends.append(told.read())
        os.waitpid(child, 0)
    return ends


def forked(call: Callable[[], object], start: float) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        while time.monotonic() < start:
            time.sleep(0)
        os.write(writing, ended(call).encode())
    finally:
        os._exit(0)


def ended(call: Callable[[], object]) -> str:
    try:
        call()
    except _CLEAR as error:
        return f"error: {error}"
    except Exception as error:  # any other class is what the battery looks for
        return f"FAILED {type(error).__name__}: {error}"
    return "saved"


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Let two write in so many rounds; then read while as many saves follow each other."""
    draw = random.Random(seed)
    ways: dict[str, Callable[[list[Callable[[], None]]], list[str]]]
    ways = {"threads": in_threads, "processes": in_processes}
    pairs = [Pair(subjects, tier) for tier in TIERS]
    ends: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(points):
        pair = pairs[number % len(pairs)]
        way = draw.choice(sorted(ways))
        pair.prepare(fresh=draw.random() < 0.3)
        calls = draw.sample(pair.saves, 2)
        try:
            ended_with = ways[way](calls)
            failures += [f"{way}: {e}" for e in ended_with if e.startswith("FAILED")]
            ends.update(f"{way} {e.split(':')[0]}" for e in ended_with)
            ends[f"{way} whole {pair.whole()}"] += 1
        except (AssertionError, OSError, ValueError) as error:
            failures.append(f"{way}, round {number}: {type(error).__name__}: {error}")
            shutil.rmtree(pair.out.parent)
            pair.saves[0]()
    read = reading(pairs[0], max(points // 2, 1))
    failures += [f"reader: {end}" for end in read if not end.islower()]
    return {
        "points": points,
        "ends": dict(sorted(ends.items())),
        "read": read,
        "failures": failures,
    }


def reading(pair: Pair, rounds: int) -> dict[str, int]:
    """Load again and again while a child writes one model after the other."""
    seen: Counter[str] = Counter()
    pair.saves[0]()
    child, pipe = forked(lambda: [save() for save in pair.saves * rounds], time.monotonic())
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            values = value_of(pair.out)
            seen["whole" if len(values) == 1 else "MIXED"] += 1
        except _CLEAR:
            seen["refused"] += 1
        except Exception as error:  # as above
            seen[f"FAILED {type(error).__name__}: {error}"] += 1
    with os.fdopen(pipe) as told:
        assert told.read() == "saved"
    return dict(seen)


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
