"""Encoders: how far the embedding of each row turns, and whether its neighbours stay.

The drop is 1 - cosine between the two programs' embeddings, the mean of a row's real tokens. Where
all embeddings share one large direction, cosines are near 1 whatever happens; so the neighbours are
told, too: the share of each row's nearest rows that stay nearest. Rows are drawn anew as queries,
among the same neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from attnopt import debug
from attnopt.verifying.calling import Call, Run, field, valid, without_labels
from attnopt.verifying.intervals import Paired
from attnopt.verifying.report import Row

NEIGHBOURS: Final = 10
POOLED: Final = ("pooler_output", "text_embeds", "image_embeds", "sentence_embedding")


@dataclass(frozen=True)
class EmbeddingScores:
    """The embeddings of both programs, (rows, channels)."""

    reference: Tensor
    program: Tensor
    seed: int = 0
    task: str = "embedding"
    what: str = "1 - cosine of the embeddings"

    @property
    def seen(self) -> str:
        """What was compared."""
        return f"{len(self.reference)} rows"

    @cached_property
    def cosine(self) -> Paired:
        """The cosine between the two embeddings of a row."""
        return Paired.of(_cosines(self.reference, self.program), seed=self.seed)

    @property
    def drop(self) -> Paired:
        """How far the embedding of a row turns: 1 - cosine."""
        return self._drop

    @cached_property
    def _drop(self) -> Paired:
        return Paired.of(1 - _cosines(self.reference, self.program), seed=self.seed)

    @property
    def nearest(self) -> int:
        """How many neighbours of a row are compared."""
        return min(NEIGHBOURS, max((len(self.reference) - 1) // 2, 1))

    @cached_property
    def retrieval(self) -> Paired:
        """The share of each row's nearest rows that are nearest in both spaces."""
        if len(self.reference) < 3:
            return Paired.of(torch.full((len(self.reference),), torch.nan))
        sets = [_neighbours(x, self.nearest) for x in (self.reference, self.program)]
        same = (sets[0].unsqueeze(2) == sets[1].unsqueeze(1)).any(2).double().mean(1)
        whole = self.reference.isfinite().all() & self.program.isfinite().all()
        return Paired.of(same if bool(whole) else same * torch.nan, seed=self.seed)

    def rows(self) -> list[Row]:
        """Return what a table shows."""
        return [
            ("cosine with the reference", "", f"{self.cosine.mean:.6f}", ""),
            (f"same {self.nearest} nearest rows", "", f"{self.retrieval.mean:.2%}", ""),
        ]

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "rows": len(self.reference),
            "cosine": self.cosine.content(),
            "retrieval": {**self.retrieval.content(), "nearest": self.nearest},
        }


def score(program: Run, reference: Run, calls: Sequence[Call], *, seed: int = 0) -> EmbeddingScores:
    """Embed the same rows with both."""
    found: list[tuple[Tensor, Tensor]] = []
    for number, call in enumerate(calls, 1):
        given = without_labels(call)
        found.append((pooled(reference(**given), call), pooled(program(**given), call)))
        debug.advance("verify", number, len(calls))
    before, after = (torch.cat(x).double() for x in zip(*found, strict=True))
    if before.shape != after.shape:
        raise ValueError(
            f"the program's embeddings have shape {list(after.shape)}, the reference's "
            f"{list(before.shape)}"
        )
    return EmbeddingScores(before, after, seed)


def pooled(output: Any, call: Call) -> Tensor:
    """Return one embedding a row: the mean of its real tokens, or what the model pooled."""
    states = output if isinstance(output, Tensor) else field(output, "last_hidden_state", *POOLED)
    if states is None:
        raise ValueError(
            f"{type(output).__name__} has no last_hidden_state and nothing pooled to compare as an "
            "embedding; name the task"
        )
    states = states.float()
    if states.dim() == 4:
        return states.mean((2, 3))
    if states.dim() != 3:
        return states.flatten(1)
    real = valid(call)
    if real is None or real.shape != states.shape[:2]:
        return states.mean(1)
    weights = real.to(states.dtype).unsqueeze(-1)
    return torch.where(real.unsqueeze(-1), states, 0.0).sum(1) / weights.sum(1).clamp(min=1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return functional.cosine_similarity(a, b, dim=-1)


def _neighbours(rows: Tensor, count: int) -> Tensor:
    unit = functional.normalize(rows.nan_to_num(), dim=-1)
    near = unit @ unit.T
    near.fill_diagonal_(-2.0)
    return near.topk(count, dim=-1).indices
