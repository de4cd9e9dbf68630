"""Time things side by side: interleaved rounds, medians, and intervals of their ratios.

Everything that is compared runs in one process, one after the other in every round, so that what
slows the machine slows all of them. A ratio is the median over the rounds of the ratio within a
round; its interval comes from resampling the rounds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

LEAST_ROUNDS: Final = 7
MOST_ROUNDS: Final = 60
WIDTH: Final = 0.02
"""Rounds stop where every ratio's interval is this wide to either side."""
SHORTEST: Final = 0.02
"""A sample repeats a call for at least this many seconds."""
RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Interval:
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Timing:
    """What the rounds of one comparison gave: seconds a call, in order of the rounds."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Return the median seconds of a call."""
        return statistics.median(self.seconds[name])

    def speedup(self, of: str, over: str) -> Interval:
        """Return how many times faster one thing is than another."""
        return ratio(self.seconds[over], self.seconds[of])


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the median over the rounds of a ratio within a round."""
    ratios = torch.tensor(above).double() / torch.tensor(below).double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[draws].quantile(0.5, dim=-1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975]).double())
    return Interval(float(ratios.quantile(0.5)), float(low), float(high))


def compare(
    calls: Mapping[str, Callable[[], Any]], *, base: str, most: int = MOST_ROUNDS
) -> Timing:
    """Time calls in interleaved rounds until their ratios to `base` are known well enough."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    timing = Timing({})
    for number in range(most):
        for name in order if number % 2 == 0 else reversed(order):
            seconds[name].append(_sample(calls[name], repeats[name]))
        timing = Timing({name: tuple(found) for name, found in seconds.items()})
        if number + 1 >= LEAST_ROUNDS and all(
            _known(timing.speedup(name, base)) for name in calls if name != base
        ):
            break
    return timing


def _known(interval: Interval) -> bool:
    return max(interval.high - interval.ratio, interval.ratio - interval.low) <= (
        WIDTH * interval.ratio
    )


def _repeats(call: Callable[[], Any]) -> int:
    """Warm up, and return how often to call for a sample that is long enough."""
    call()
    once = min(_sample(call, 1) for _ in range(3))
    return max(1, round(SHORTEST / once))


def _sample(call: Callable[[], Any], repeats: int) -> float:
    gc.disable()
    _finish()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish()
    seconds = (time.perf_counter() - start) / repeats
    gc.enable()
    return seconds


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
