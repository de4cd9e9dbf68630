"""What a rewrite costs in quality on some rows, beside the program that it came from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attnopt import debug
from attnopt.program import Program
from attnopt.verifying import embedding, language
from attnopt.verifying.calling import Call, in_float32, without_labels
from attnopt.verifying.tasks import objective_of, special_tokens, task_of

# What is kept of the source's results, in numbers.
_HELD = 2**27
# How far a distance is trusted to tell a loss, as a share of it.
_TRUST = 0.3
_LEAST = 1e-9


@dataclass(frozen=True)
class Look:
    """The damage on some rows, by token or by row: what rises, its standard error, a distance.

    For a language model `excess` is the rise of the loss in nats, and `divergence` that of KL from
    the source, which is never negative and varies less; for other models both are the distance.
    """

    excess: float
    error: float
    divergence: float
    base: float = 0.0

    def cost(self, rate: float) -> float:
        """Weigh what rises against what its distance says, each by its uncertainty.

        `rate` is what a unit of distance costs. Where few rows leave the loss uncertain the
        distance has its say, which varies less and tells rewrites apart that the loss does not.
        """
        told = rate * self.divergence
        spread = max(_TRUST * told, _LEAST)
        error = max(self.error, _LEAST)
        loss, distance = 1 / error**2, 1 / spread**2
        return max((loss * self.excess + distance * told) / (loss + distance), 0.0)

    def content(self) -> list[float]:
        """Return this as JSON values."""
        return [self.excess, self.error, self.divergence, self.base]


class Judge:
    """Looks at rewritten programs on the same rows, and remembers what the source says there."""

    def __init__(self, program: Program, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._source = _Remembered(in_float32(program))
        with torch.no_grad():
            self.task = task_of(self._source.run, calls[0])
            causal = self.task == "lm"
            self._objective: language.Objective | None = (
                objective_of(self._source.run, calls[0]) if causal else None
            )

    @property
    def unit(self) -> str:
        """What the damage is counted in."""
        return "nats a token" if self.task == "lm" else "distance from the source"

    @torch.no_grad()
    def look(self, program: Program) -> Look:
        """Compare a program with its source."""
        self._source.begin()
        with debug.listening(_silence):
            after = in_float32(program)
            if self.task == "lm":
                return self._language(after)
            rows = torch.cat([_distance(after, self._source, c, self.task) for c in self.calls])
        mean = float(rows.mean())
        return Look(mean, _error(rows, torch.ones_like(rows)), mean)

    def _language(self, after: Any) -> Look:
        assert self._objective is not None
        start = special_tokens(getattr(self._source.run, "config", None))
        found = language.score(
            after, self._source, self.calls, objective=self._objective, start_token=start
        )
        change = found.nll.double() - found.reference_nll.double()
        divergence = 0.0 if found.kl is None else float(found.kl.mean)
        excess = found.mean - found.base
        return Look(excess, _error(change, found.counts), divergence, found.base)


def rate_of(looks: Sequence[Look]) -> float:
    """Return what a unit of distance costs, over all that was looked at."""
    total = sum(look.divergence for look in looks)
    return min(max(sum(look.excess for look in looks) / total, 0.2), 5.0) if total > 0 else 1.0


def _silence(name: str, done: int, total: int) -> None:
    """Tell nobody of steps inside a step."""


def _error(change: Tensor, counts: Tensor) -> float:
    """Return the standard error of a weighted mean over rows."""
    counts = counts.double()
    if len(change) < 2:
        return math.inf
    mean = (change * counts).sum() / counts.sum()
    spread = ((change - mean) * counts).square().sum().sqrt() / counts.sum()
    return float(spread * math.sqrt(len(change) / (len(change) - 1)))


class _Remembered:
    """A program that is always called in the same order; its results are kept."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.config = getattr(run, "config", None)
        self._known: list[Any] = []
        self._next = 0
        self._size = 0

    def begin(self) -> None:
        """Start from the first call again."""
        self._next = 0

    def __call__(self, **given: Any) -> Any:
        number, self._next = self._next, self._next + 1
        if number < len(self._known):
            return self._known[number]
        output = self.run(**given)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        kept = logits if isinstance(logits, Tensor) else output
        self._size += kept.numel() if isinstance(kept, Tensor) else 0
        if number == len(self._known) and self._size <= _HELD:
            self._known.append(kept)
        return output


def _distance(after: Any, before: Any, call: Call, task: str) -> Tensor:
    """Return how far the results of each row are apart."""
    given = without_labels(call)
    if task == "embedding":
        a, b = (embedding.pooled(run(**given), call) for run in (after, before))
        return 1 - functional.cosine_similarity(a.double(), b.double(), dim=-1)
    logs = [_logits(run(**given)).double().log_softmax(-1) for run in (after, before)]
    divergence = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    return divergence.flatten(1).mean(1) if divergence.dim() > 1 else divergence


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor = output["logits"] if isinstance(output, Mapping) else output.logits
    return found
