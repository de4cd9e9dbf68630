"""Confidence intervals of paired differences, by rows: what is independent is the row.

A mean over tokens is a ratio of sums over rows, sum(a) / sum(b). Its interval is the studentized
bootstrap: rows are drawn anew, and the error of each draw is measured in that draw's own standard
error, which keeps the coverage where a few rows carry most of the difference (Efron, Tibshirani,
An Introduction to the Bootstrap, chapter 12). Percentiles, BCa and Student's t fall short there
(`tests/bench/gate.py` measures it). Counts of right and wrong answers have intervals of their own:
no draw of 96 rows without a difference shows that there is none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions
from torch import Tensor

DRAWS = 4000
_TAIL = 0.025
_AT_ONCE = 2**22
# A draw of equal rows has no error of its own; it must not count as infinitely far off.
_LEAST_ERROR = 0.1
# Of fewer rows there are too few different draws: Student's interval has to be inside.
_FEW = 20

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """A paired difference: its mean and a 95 % confidence interval over the rows."""

    mean: float
    ci95: tuple[float, float]
    rows: int

    @classmethod
    def of(cls, differences: Tensor, weights: Tensor | None = None, *, seed: int = 0) -> "Paired":
        """Return sum(differences) / sum(weights), or their mean, with the bootstrap's interval."""
        upper = differences.double().numpy()
        lower = np.ones_like(upper) if weights is None else weights.double().numpy()
        count, below = len(upper), float(lower.sum())
        if not (np.isfinite(upper).all() and np.isfinite(lower).all()) or below <= 0:
            return cls(math.nan, (-math.inf, math.inf), count)
        if count < 2:
            return cls(float(upper.sum()) / below, (-math.inf, math.inf), count)
        low, high = studentized(upper, lower, seed=seed)
        if count < _FEW:
            half = float(distributions.t.ppf(1 - _TAIL, count - 1)) * standard_error(upper, lower)
            middle = float(upper.sum()) / below
            low, high = min(low, middle - half), max(high, middle + half)
        return cls(float(upper.sum()) / below, (low, high), count)

    @classmethod
    def of_share(cls, happened: int, rows: int) -> "Paired":
        """Return how often something happened, with the exact interval of Clopper and Pearson."""
        low, high = 0.0, 1.0
        if happened > 0:
            low = float(distributions.beta.ppf(_TAIL, happened, rows - happened + 1))
        if happened < rows:
            high = float(distributions.beta.ppf(1 - _TAIL, happened + 1, rows - happened))
        return cls(happened / rows, (low, high), rows)

    @classmethod
    def of_flips(cls, lost: int, won: int, rows: int) -> "Paired":
        """Return the share of rows lost minus that of rows won, with Tango's score interval."""
        mean = (lost - won) / rows

        def score(drop: float) -> float:
            return _tango(lost, won, rows, drop)

        limit = float(distributions.norm.ppf(1 - _TAIL))
        low = _crossing(score, limit, -1.0, mean)
        high = _crossing(score, -limit, mean, 1.0)
        return cls(mean, (low, high), rows)

    def content(self) -> dict[str, object]:
        """Return the numbers as JSON values; what is not finite is null."""
        return {"mean": finite(self.mean), "ci95": [finite(x) for x in self.ci95]}


def finite(number: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return number if math.isfinite(number) else None


def studentized(
    upper: Array, lower: Array, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of sum(upper) / sum(lower) by the studentized bootstrap over rows."""
    ratio = upper.sum() / lower.sum()
    residuals = upper - ratio * lower
    error = standard_error(upper, lower)
    if error <= abs(ratio) * np.finfo(np.float64).eps:
        return (float(ratio), float(ratio))
    random, found = np.random.default_rng(seed), []
    for start in range(0, draws, size := max(_AT_ONCE // len(upper), 1)):
        counts = _drawn(random, len(upper), min(size, draws - start))
        apart, own = _error(counts, residuals, lower)
        found.append(apart / np.maximum(own, _LEAST_ERROR * error))
    low, high = np.quantile(np.concatenate(found), [_TAIL, 1 - _TAIL], method="weibull")
    return (float(ratio - high * error), float(ratio - low * error))


def standard_error(upper: Array, lower: Array) -> float:
    """Return the standard error of sum(upper) / sum(lower)."""
    residuals = upper - upper.sum() / lower.sum() * lower
    return float(_error(np.ones((1, len(upper))), residuals, lower)[1][0])


def _drawn(random: np.random.Generator, rows: int, draws: int) -> Array:
    """Return how often each row comes up in each draw with replacement."""
    return random.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float64)


def _error(counts: Array, residuals: Array, lower: Array) -> tuple[Array, Array]:
    """Return how far each draw's ratio is from the whole's, and its standard error."""
    rows, below = counts.shape[1], counts @ lower
    apart = (counts @ residuals) / below
    squares = (
        counts @ residuals**2
        - 2 * apart * (counts @ (residuals * lower))
        + apart**2 * (counts @ lower**2)
    )
    return apart, np.sqrt(np.maximum(squares, 0) * rows / (rows - 1)) / below


def _tango(lost: int, won: int, rows: int, drop: float) -> float:
    """Return how many standard errors the counts are above a supposed drop.

    The error is that of the likeliest share of rows won under the drop. Tango, Statistics in
    Medicine 17 (1998), 891-908.
    """
    middle = -lost - won + (2 * rows - lost + won) * drop
    last = -won * drop * (1 - drop)
    root = math.sqrt(max(middle**2 - 8 * rows * last, 0.0))
    share = (root - middle) / (4 * rows)
    spread = math.sqrt(max(rows * (2 * share + drop * (1 - drop)), 0.0))
    apart = lost - won - rows * drop
    return apart / spread if spread > 0 else math.copysign(math.inf, apart) if apart else 0.0


def _crossing(score: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Return where a falling score passes a value, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > wanted else (low, middle)
    return (low + high) / 2
