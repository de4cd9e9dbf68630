"""Verification: what a rewrite costs in quality, paired with the source on the same held-out rows.

The gate is the upper bound of a confidence interval, never the mean: a rewrite is accepted when the
relative increase of the held-out loss is below the limit with 97.5 % confidence.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy import stats as distributions
from torch import Tensor
from torch.nn import functional

from attnopt import debug
from attnopt.lowering import lower
from attnopt.program import Program


@dataclass(frozen=True)
class Paired:
    """A paired difference: its mean and a 95 % confidence interval over the rows."""

    mean: float
    ci95: tuple[float, float]
    rows: int

    @classmethod
    def of(cls, differences: Tensor) -> "Paired":
        """Read off the mean and the interval by Student's t over independent rows."""
        values = differences.double()
        count, mean = len(values), float(values.mean())
        if count < 2:
            return cls(mean, (-math.inf, math.inf), count)
        error = float(values.std(unbiased=True)) / math.sqrt(count)
        half = float(distributions.t.ppf(0.975, count - 1)) * error
        return cls(mean, (mean - half, mean + half), count)


@dataclass(frozen=True)
class Report:
    """What was measured: the losses of both programs row by row, and whether the gate is passed."""

    reference_nll: Tensor
    nll: Tensor
    tokens: int
    max_drop: float | None = None

    @cached_property
    def delta_nll(self) -> Paired:
        """The change of the loss in nats per token."""
        return Paired.of(self.nll - self.reference_nll)

    @cached_property
    def drop(self) -> Paired:
        """The change of the loss relative to the reference's mean loss."""
        return Paired.of(self.nll / self.base - self.reference_nll / self.base)

    @property
    def base(self) -> float:
        """The mean loss of the reference."""
        return float(self.reference_nll.double().mean())

    @property
    def accepted(self) -> bool:
        """Whether the upper bound of the drop is within the limit; without one, always."""
        if not math.isfinite(self.drop.mean):
            return False
        return self.max_drop is None or self.drop.ci95[1] <= self.max_drop

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "rows": self.delta_nll.rows,
            "tokens": self.tokens,
            "reference_nll": self.base,
            "nll": float(self.nll.double().mean()),
            "delta_nll": {"mean": self.delta_nll.mean, "ci95": list(self.delta_nll.ci95)},
            "drop": {"mean": self.drop.mean, "ci95": list(self.drop.ci95)},
            "max_drop": self.max_drop,
            "accepted": self.accepted,
        }


def verify(program: Any, reference: Any, data: Any, *, max_drop: float | None = None) -> Report:
    """Compare a program with its reference, row by row, on held-out tokens.

    Both are Programs or modules that take `input_ids` and return logits; both compute in float32.
    """
    rows = _rows(data)
    before = losses(reference, rows, "reference")
    after = losses(program, rows, "rewritten")
    return Report(before, after, rows.shape[0] * (rows.shape[1] - 1), max_drop)


def losses(program: Any, rows: Tensor, stage: str, *, tokens: int = 4096) -> Tensor:
    """Return the mean loss of each row in nats per token."""
    run = in_float32(program) if isinstance(program, Program) else program
    parts = rows.split(max(tokens // rows.shape[1], 1))
    found: list[Tensor] = []
    with torch.no_grad():
        for number, part in enumerate(parts, 1):
            logits = run(input_ids=part).logits.float()
            per_token = functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"
            )
            found.append(per_token.double().mean(1))
            debug.advance(f"verify {stage}", number, len(parts))
    return torch.cat(found)


def in_float32(program: Program) -> Any:
    """Return something callable that runs a program in float32, fast where that is possible."""
    if set(program.parts) - {"encode", "decode"}:
        return program.cast(torch.float32)
    return lower(program, "eager").to(torch.float32)


def _rows(data: Any) -> Tensor:
    held = getattr(data, "held_out", data)
    if isinstance(held, Mapping):
        held = held["input_ids"]
    if not isinstance(held, Tensor) or held.dim() != 2 or held.is_floating_point():
        raise TypeError("verify needs held-out token ids, (rows, tokens)")
    return held
