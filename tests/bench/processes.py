"""Work that is done in processes of its own, and times that come from several of them.

Where the arrays of a process lie decides by a percent or two how long its calls take, in all rounds
alike: a ratio that is that close to one is asked of more processes, and all their rounds count.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from harness import Interval

from attnopt.timing import RESAMPLES, ratio

CLOSE: Final = 0.02
"""How near to one a ratio is looked at again."""
MARK: Final = "@row "
"""Begins the line of an answer; libraries write to stdout, too."""

Seconds = dict[str, list[float]]


def apart(script: str, *words: str, limit: float) -> Any:
    """Let a script do a part of its work; return its answer, or in a text what it died of."""
    command = [sys.executable, "-W", "ignore", script, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {limit:.0f} s"
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x and not x.startswith((" ", "Set TORCH"))]
        return " ".join(lines[-2:])[-400:] or f"ended with {done.returncode}"
    answers = [x.removeprefix(MARK) for x in done.stdout.splitlines() if x.startswith(MARK)]
    return json.loads(answers[-1]) if answers else None


def answer(found: Any) -> None:
    """Say in a process of its own what was found."""
    print(MARK + json.dumps(found))


def while_close(
    turns: int, measure: Callable[[int], Any], rows_of: Callable[[list[Any]], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Measure in turns until no ratio of the rows that all turns make is close to one."""
    found: list[Any] = []
    rows: list[dict[str, Any]] = []
    for turn in range(turns):
        found.append(measure(turn))
        rows = rows_of(found)
        gains = [gain["ratio"] for row in rows for gain in row.get("speedup", {}).values()]
        if not any(abs(gain - 1) < CLOSE for gain in gains):
            break
    return rows


def speedup(name: str, base: str, seconds: Sequence[Seconds]) -> Interval:
    """Return how much faster `base` is: of one process, or by resampling processes and rounds."""
    if len(seconds) == 1:
        return ratio(seconds[0][name], seconds[0][base])
    each = [np.asarray(x[name]) / np.asarray(x[base]) for x in seconds]
    chance = np.random.default_rng(0)
    medians = []
    for _ in range(RESAMPLES):
        chosen = [each[i] for i in chance.integers(len(each), size=len(each))]
        medians.append(np.median(np.concatenate([chance.choice(x, len(x)) for x in chosen])))
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(float(np.median(np.concatenate(each))), float(low), float(high))
