"""What was measured of a program beside its reference, and whether the gate is passed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from attnopt.nouns import No
from attnopt.verifying.intervals import Paired, finite

# What a table says of one thing: its name, the reference, the program, the change.
Row = tuple[str, str, str, str]


class Scores(Protocol):
    """What the scores of a task have in common."""

    @property
    def task(self) -> str:
        """The task, as `verify` takes it."""
        ...

    @property
    def drop(self) -> Paired:
        """What the gate judges: how much worse the program is."""
        ...

    @property
    def what(self) -> str:
        """The drop, in words."""
        ...

    @property
    def seen(self) -> str:
        """What was compared, such as "9,120 tokens in 96 rows"."""
        ...

    def rows(self) -> list[Row]:
        """Return what a table shows."""
        ...

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        ...


@dataclass(frozen=True)
class Report:
    """The scores of both programs, row by row, and whether the gate is passed.

    `sites` has the relative squared error of each attention's result. What has `nll` in its name is
    there for language models only.
    """

    scores: Scores
    max_drop: float | None = None
    source: str = ""
    notes: tuple[str, ...] = ()
    sites: Mapping[str, float | No] = field(default_factory=dict)
    benchmarks: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task: lm, embedding or classification."""
        return self.scores.task

    @property
    def drop(self) -> Paired:
        """How much worse the program is, in the task's own measure."""
        return self.scores.drop

    @property
    def accepted(self) -> bool:
        """Whether the upper bound of the drop is within the limit; without one, always."""
        if not math.isfinite(self.drop.mean):
            return False
        return self.max_drop is None or self.drop.ci95[1] <= self.max_drop

    @property
    def delta_nll(self) -> Paired:
        """The change of the loss in nats per token."""
        return self._language("delta_nll")  # type: ignore[no-any-return]

    @property
    def reference_nll(self) -> Tensor:
        """The reference's loss of each row, in nats per token."""
        return self._language("reference_nll")  # type: ignore[no-any-return]

    @property
    def nll(self) -> Tensor:
        """The program's loss of each row, in nats per token."""
        return self._language("nll")  # type: ignore[no-any-return]

    @property
    def tokens(self) -> int:
        """How many tokens were compared."""
        return self._language("tokens")  # type: ignore[no-any-return]

    @property
    def base(self) -> float:
        """The mean loss of the reference."""
        return self._language("base")  # type: ignore[no-any-return]

    def _language(self, name: str) -> Any:
        if self.task != "lm":
            raise AttributeError(f"the task is {self.task}, which has no {name}; see Report.drop")
        return getattr(self.scores, name)

    @property
    def verdict(self) -> str:
        """What the gate says, in a line or two."""
        low, high = self.drop.ci95
        told = (
            f"{self.scores.what}: {self.drop.mean:+.2%}, 95 % confidence {low:+.2%} to {high:+.2%} "
            f"(paired, {self.scores.seen})"
        )
        if self.max_drop is None:
            return f"{told}\nno --max-drop was given: nothing was gated"
        # As many digits as tell the two apart: a bound is never shown as the limit that it missed.
        digits = next((d for d in range(2, 15) if f"{high:.{d}%}" != f"{self.max_drop:.{d}%}"), 2)
        bound, limit = f"{high:+.{digits}%}", f"{self.max_drop:.{digits}%}"
        if self.accepted:
            return f"{told}\ngate: upper bound {bound} <= {limit}: accepted"
        if self.drop.mean <= self.max_drop:
            hint = "these rows cannot show less; give more of them, or allow more --max-drop"
        else:
            hint = "allow more --max-drop, or change less"
        sign = ">" if math.isfinite(self.drop.mean) else "is no number, limit"
        return f"{told}\ngate: upper bound {bound} {sign} {limit}: REJECTED; {hint}"

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "task": self.task,
            **self.scores.content(),
            "drop_is": self.scores.what,
            "drop": self.drop.content(),
            "max_drop": self.max_drop,
            "accepted": self.accepted,
            "data": self.source,
            "notes": list(self.notes),
            "sites": {n: _said(e) for n, e in self.sites.items()},
            "benchmarks": {
                task: {metric: list(pair) for metric, pair in found.items()}
                for task, found in self.benchmarks.items()
            },
        }


def _said(error: float | No) -> float | str | None:
    return str(error) if isinstance(error, No) else finite(error)
