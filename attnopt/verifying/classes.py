"""Classifiers: whether the answers stay right where the right ones are known, or stay the same.

With labels the drop is that of the accuracy, paired row by row; without, the share of rows whose
answer changes. Classifiers of tokens are compared token by token, and their rows are what is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnopt import debug
from attnopt.verifying.calling import Call, Run, field, valid, without_labels
from attnopt.verifying.intervals import Paired
from attnopt.verifying.report import Row

_IGNORED = -100


@dataclass(frozen=True)
class ClassScores:
    """For each row: its answers, how many both programs share, and how many each has right."""

    counts: Tensor
    agreeing: Tensor
    reference_right: Tensor | None
    right: Tensor | None
    flips: tuple[int, int] | None
    seed: int = 0
    task: str = "classification"

    @property
    def what(self) -> str:
        """The drop, in words."""
        return "other answers" if self.right is None else "fall of the accuracy"

    @property
    def seen(self) -> str:
        """What was compared."""
        answers = int(self.counts.sum())
        rows = f"{len(self.counts)} rows"
        return rows if answers == len(self.counts) else f"{answers:,} answers in {rows}"

    @cached_property
    def disagreement(self) -> Paired:
        """The share of answers that differ."""
        return self._share(self.counts - self.agreeing)

    @property
    def drop(self) -> Paired:
        """The fall of the accuracy, or the share of answers that differ."""
        return self._drop

    @cached_property
    def _drop(self) -> Paired:
        if self.right is None or self.reference_right is None:
            return self.disagreement
        if not bool(self.right.isfinite().all() & self.reference_right.isfinite().all()):
            return Paired.of(self.right)
        if self.flips is not None:
            return Paired.of_flips(*self.flips, len(self.counts))
        return Paired.of(self.reference_right - self.right, self.counts, seed=self.seed)

    def _share(self, happened: Tensor) -> Paired:
        """Return a share of the answers, exactly where a row has one."""
        if bool((self.counts == 1).all()) and bool(happened.isfinite().all()):
            return Paired.of_share(int(happened.sum()), len(happened))
        return Paired.of(happened, self.counts, seed=self.seed)

    def accuracy(self, right: Tensor) -> float:
        """Return the share of right answers."""
        return float(right.sum() / self.counts.sum())

    def rows(self) -> list[Row]:
        """Return what a table shows."""
        found: list[Row] = []
        if self.right is not None and self.reference_right is not None:
            before, after = self.accuracy(self.reference_right), self.accuracy(self.right)
            found.append(("accuracy", f"{before:.2%}", f"{after:.2%}", f"{after - before:+.2%}"))
        return [*found, ("same answer", "", f"{1 - self.disagreement.mean:.2%}", "")]

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        found: dict[str, Any] = {
            "rows": len(self.counts),
            "answers": int(self.counts.sum()),
            "disagreement": self.disagreement.content(),
        }
        if self.right is not None and self.reference_right is not None:
            found["reference_accuracy"] = self.accuracy(self.reference_right)
            found["accuracy"] = self.accuracy(self.right)
        return found


def score(program: Run, reference: Run, calls: Sequence[Call], *, seed: int = 0) -> ClassScores:
    """Run both on the same calls, and compare their answers."""
    found: list[tuple[Tensor, ...]] = []
    labelled = all("labels" in call for call in calls)
    for number, call in enumerate(calls, 1):
        given = without_labels(call)
        before, after = (logits_of(run(**given)) for run in (reference, program))
        if before.shape != after.shape:
            raise ValueError(
                f"the program's logits have shape {list(after.shape)}, the reference's "
                f"{list(before.shape)}"
            )
        found.append(_compared(before, after, call, labelled=labelled))
        debug.advance("verify", number, len(calls))
    counts, agreeing, old, new, lost, won = (torch.cat(x) for x in zip(*found, strict=True))
    kept = counts > 0
    if not bool(kept.any()):
        raise ValueError("the held-out rows have no answer to compare: all are padding, or ignored")
    single = labelled and bool((counts[kept] == 1).all())
    flips = (int(lost.sum()), int(won.sum())) if single else None
    return ClassScores(
        counts[kept],
        agreeing[kept],
        old[kept] if labelled else None,
        new[kept] if labelled else None,
        flips,
        seed,
    )


def logits_of(output: Any) -> Tensor:
    """Return the logits of a classifier, (rows, classes) or (rows, tokens, classes)."""
    logits = output if isinstance(output, Tensor) else field(output, "logits")
    if logits is None or logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        shape = "none" if logits is None else f"of shape {list(logits.shape)}"
        raise ValueError(
            f"classification needs logits (rows, classes) of at least two classes, or (rows, "
            f"tokens, classes); {type(output).__name__} has {shape}"
        )
    return logits.float()


def _compared(before: Tensor, after: Tensor, call: Call, *, labelled: bool) -> tuple[Tensor, ...]:
    """Return for each row: answers, shared ones, right ones of both, lost and won ones."""
    counted = torch.ones(before.shape[:-1], dtype=torch.bool)
    real = valid(call)
    if before.dim() == 3 and real is not None and real.shape == counted.shape:
        counted &= real
    labels = call["labels"] if labelled else torch.zeros(counted.shape, dtype=torch.long)
    if labels.shape != counted.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}; the logits ask for {list(counted.shape)}"
        )
    counted &= labels != _IGNORED
    old, new = before.argmax(-1), after.argmax(-1)
    # An answer out of numbers that are none is no answer.
    whole = (before.isfinite().all(-1) & after.isfinite().all(-1)) | ~counted
    broken = torch.where(whole, 0.0, torch.nan).double()
    right_before, right_after = (old == labels) & counted, (new == labels) & counted
    columns = (
        counted.double(),
        ((old == new) & counted).double() + broken,
        right_before.double() + broken,
        right_after.double() + broken,
        (right_before & ~right_after).double(),
        (right_after & ~right_before).double(),
    )
    return tuple(c if c.dim() == 1 else c.sum(1) for c in columns)
