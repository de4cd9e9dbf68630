"""The rows that a run learns from, is watched by, and is judged by: three sets without overlap.

What is watched decides when to stop and which weights are kept, so it cannot judge them, too.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.data import Source, Split, split_of

Batch = dict[str, Tensor]
# Of text that is named and not given: half to watch, half to judge by.
HELD_OUT = 192


@dataclass(frozen=True)
class Rows:
    """Tensors by the names of the call, equally long; row i of each belongs together."""

    learned: Mapping[str, Tensor]
    watched: Mapping[str, Tensor]
    judged: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """Name the rows by their content."""
        whole = hashlib.sha256()
        for part in (self.learned, self.watched, self.judged):
            for name in sorted(part):
                tensor = part[name].contiguous()
                whole.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                whole.update(tensor.view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()


def _named(rows: Any) -> dict[str, Tensor]:
    """Return rows by the names of a program's inputs."""
    if isinstance(rows, Tensor):
        return {"input_ids": rows}
    if isinstance(rows, Mapping):
        return dict(rows)
    raise TypeError("heal needs rows of one length: a tensor, or named tensors of as many rows")


def rows_of(data: Any, tokenizer: Any) -> Rows:
    """Cut data into rows: a Split, token ids, named tensors, or a source of text by its name.

    `tokenizer` is called for a source of text only.
    """
    if isinstance(data, str | os.PathLike):
        data = Source.parse(os.fspath(data))
    if isinstance(data, Source):
        data = split_of(data, tokenizer() if data.is_text else None, held_out=HELD_OUT)
    if isinstance(data, Split):
        return _of(_named(data.calibration), _named(data.held_out))
    if isinstance(data, Tensor):
        data = {"input_ids": data}
    if not isinstance(data, Mapping) or not all(isinstance(x, Tensor) for x in data.values()):
        raise TypeError(
            "heal needs rows: token ids (rows, tokens), named tensors of as many rows, a Split, "
            f"or the name of a source of text, not {type(data).__name__}"
        )
    counts = {len(x) for x in data.values()}
    if len(counts) != 1 or min(counts) < 4:
        raise ValueError(
            "heal needs at least four rows, as many in every tensor: three quarters to learn from, "
            "the rest to watch and to judge by"
        )
    held = max(counts.pop() // 4, 2)
    return _of({n: x[:-held] for n, x in data.items()}, {n: x[-held:] for n, x in data.items()})


def _of(learned: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Rows:
    count = len(next(iter(held.values())))
    if count < 2:
        raise ValueError("heal needs two held-out rows or more: some to watch, some to judge by")
    judged = count - count // 2
    return Rows(
        learned,
        watched={n: x[judged:] for n, x in held.items()},
        judged={n: x[:judged] for n, x in held.items()},
    )


def taken(rows: Mapping[str, Tensor], index: Tensor, device: torch.device) -> Batch:
    """Return some rows."""
    return {name: x[index].to(device) for name, x in rows.items()}


@dataclass(frozen=True)
class Deal:
    """An endless order of rows: every row once an epoch, each epoch in an order of its own."""

    count: int
    seed: int

    def between(self, start: int, stop: int) -> Tensor:
        """Return the rows at some places of the order."""
        epochs = range(start // self.count, (stop - 1) // self.count + 1)
        order = torch.cat([self._epoch(e) for e in epochs])
        first = start - epochs.start * self.count
        return order[first : first + stop - start]

    def _epoch(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(self.count, generator=generator)


def chunks(rows: Mapping[str, Tensor], *, tokens: int = 4096) -> Iterator[Tensor]:
    """Yield the numbers of rows that are run together."""
    first = next(iter(rows.values()))
    per_row = first.shape[1] if first.dim() == 2 else 256
    yield from torch.arange(len(first)).split(max(tokens // max(per_row, 1), 1))
