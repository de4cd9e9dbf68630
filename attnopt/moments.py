"""What calibration keeps of the inputs of a parameter: second moments, mean sizes, few rows whole.

As long as there are no more rows than channels, the rows themselves are smaller than their second
moment, exact, and enough for every solve (by Woodbury's identity); then they are kept instead.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.ridge import Dense, Few, Ridge
from attnopt.tensorfiles import TensorFile, put, settle, write_tensors
from attnopt.weights import Spool, described

FORMAT = 2
_ROWS = 1024


class Moments:
    """Running sums over the rows (tokens, channels) that a parameter is multiplied with."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.first = [0, 0.0]
        self._rows: list[Tensor] = []
        self._total: Tensor | None = None
        self._absolute = torch.zeros(width, dtype=torch.float64)
        self._contributions: dict[str, Tensor] = {}

    def add(self, rows: Tensor) -> None:
        """Add rows that count."""
        self.count += len(rows)
        self._absolute += rows.abs().sum(0, dtype=torch.float64)
        if self._total is None and self.count <= rows.shape[1]:
            self._rows.append(rows.clone())
            return
        if self._total is None:
            size = rows.shape[1] + 1
            self._total = torch.zeros(size, size, dtype=torch.float64)
        for kept in (*self._rows, rows):
            _add_square(self._total, kept)
        self._rows.clear()

    def add_first(self, rows: Tensor) -> None:
        """Add the first tokens of sequences, of which the mean size is kept."""
        self.first[0] += len(rows)
        self.first[1] += float(rows.double().norm(dim=1).sum())

    def add_contribution(self, parameter: str, amounts: Tensor) -> None:
        """Add what the heads give to the outputs of a parameter, summed over rows."""
        self._contributions[parameter] = self._contributions.get(parameter, 0) + amounts

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Return the sums under the names that `Statistics` reads."""
        found = {f"absolute.{key}": self._absolute}
        found |= {f"contribution.{name}": t for name, t in self._contributions.items()}
        if self._total is not None:
            return found | {f"total.{key}": self._total}
        width = len(self._absolute)
        return found | {f"rows.{key}": torch.cat([torch.empty(0, width), *self._rows])}


def _add_square(total: Tensor, rows: Tensor) -> None:
    """Add x x^T of each row, a constant 1 appended to it."""
    for part in rows.split(_ROWS):
        longer = with_one(part)
        total.addmm_(longer.T, longer)


def with_one(rows: Tensor) -> Tensor:
    """Return rows in float64 with a constant 1 appended."""
    made = torch.ones(len(rows), rows.shape[1] + 1, dtype=torch.float64)
    made[:, :-1] = rows
    return made


def contribution(rows: Tensor, weight: Tensor, heads: tuple[tuple[int, ...], ...]) -> Tensor:
    """Sum over rows, for each head, the absolute values of what the head adds to the output.

    `weight` is (channels, outputs); a head reads some of the channels.
    """
    made = torch.zeros(len(heads), dtype=torch.float64)
    for part in rows.split(_ROWS):
        for number, channels in enumerate(heads):
            read = torch.tensor(channels)
            made[number] += (part[:, read] @ weight[read]).abs().sum(dtype=torch.float64)
    return made


class Refits(MutableMapping[str, tuple[Tensor, Tensor]]):
    """Pairs of moments by name, on disk where they are large.

    With a `folder` each pair is also kept there, for a process that goes on after this one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._held = Spool()
        self._names: dict[str, None] = {}
        self._folder: Path | None = None
        for place in sorted(folder.glob("pair-*.safetensors")) if folder is not None else ():
            file = TensorFile(place)
            self[file.notes["name"]] = file["gram"], file["cross"]
        self._folder = folder

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._names:
            raise KeyError(name)
        return self._held[f"refit.gram.{name}"], self._held[f"refit.cross.{name}"]

    def __setitem__(self, name: str, pair: tuple[Tensor, Tensor]) -> None:
        self._names[name] = None
        self._held[f"refit.gram.{name}"], self._held[f"refit.cross.{name}"] = pair
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            both: dict[str, Tensor] = dict(zip(("gram", "cross"), pair, strict=True))
            put(self._folder / f"pair-{digest}.safetensors", both, {"name": name})

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        del self._held[f"refit.gram.{name}"], self._held[f"refit.cross.{name}"]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All of them, by the names that they are stored under."""
        return self._held


@dataclass(frozen=True)
class Statistics:
    """What calibration saw: moments by parameter, and the weights that they belong to.

    `tensors` holds the sums, in memory or on disk; `owners` names, for each parameter, the one
    under which those of their common input are stored. Passes keep in `memo` what they work out.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    owners: Mapping[str, str] = field(repr=False)
    counts: Mapping[str, int] = field(repr=False)
    firsts: Mapping[str, tuple[int, float]] = field(repr=False)
    tokens: int = 0
    identity: Mapping[str, str] = field(default_factory=dict, repr=False)
    batches: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    refits: Refits = field(default_factory=Refits, repr=False)
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def gram(self, parameter: str) -> Tensor:
        """Return E[x x^T] of the inputs of a parameter, whose last entry is the constant 1."""
        key = self._key(parameter)
        if f"total.{key}" in self.tensors:
            total = self.tensors[f"total.{key}"]
            # What was read from a file just now is nobody else's.
            made = total if isinstance(self.tensors, TensorFile) else total.clone()
            return made.div_(self.counts[key])
        rows = with_one(self.tensors[f"rows.{key}"])
        return (rows.T @ rows).div_(self.counts[key])

    def rows(self, parameter: str) -> Tensor | None:
        """Return the inputs themselves, (tokens, channels), where they are few; None otherwise."""
        key = self._key(parameter)
        return self.tensors.get(f"rows.{key}")

    def absolute(self, parameter: str) -> Tensor:
        """Return E|x| of each input channel of a parameter."""
        key = self._key(parameter)
        return self.tensors[f"absolute.{key}"] / self.counts[key]

    def contribution(self, parameter: str) -> Tensor:
        """Return E||x_h W_h||_1 of each query head h of an output projection W."""
        key = self._key(parameter)
        if f"contribution.{parameter}" not in self.tensors:
            raise KeyError(
                f"no contributions of heads to {parameter}: it is no output projection whose "
                "columns could be mapped to heads"
            )
        return self.tensors[f"contribution.{parameter}"] / self.counts[key]

    def ridge(self, parameter: str, ridge: float) -> Ridge:
        """Return what solves on the inputs of a parameter need, without the constant 1."""
        rows = self.rows(parameter)
        if rows is not None:
            return Few(rows.double(), ridge)
        return Dense(self.gram(parameter)[:-1, :-1].clone(), ridge)

    def mean(self, parameter: str) -> Tensor:
        """Return E[x] of the inputs of a parameter."""
        rows = self.rows(parameter)
        return self.gram(parameter)[-1, :-1] if rows is None else rows.double().mean(0)

    def first(self, parameter: str) -> tuple[int, float]:
        """Return how many first tokens were left out of the moments, and their mean norm."""
        count, total = self.firsts[self._key(parameter)]
        return count, total / count if count else 0.0

    def _key(self, parameter: str) -> str:
        if parameter not in self.owners:
            known = ", ".join(list(self.owners)[:4])
            raise KeyError(f"no statistics of {parameter}; there are those of {known} ...")
        return self.owners[parameter]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the data to a safetensors file, in one step."""
        own = [name for name in self.tensors if not name.startswith("refit.")]
        held: dict[str, Mapping[str, Tensor]] = dict.fromkeys(own, self.tensors)
        held |= dict.fromkeys(self.refits.tensors, self.refits.tensors)
        notes = {
            "format": FORMAT,
            "owners": dict(self.owners),
            "counts": dict(self.counts),
            "firsts": {key: list(first) for key, first in self.firsts.items()},
            "tokens": self.tokens,
            "refits": sorted(self.refits),
            "identity": dict(self.identity),
        }
        place = Path(path)
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        told = {"attnopt": json.dumps(notes, sort_keys=True)}
        try:
            shapes = {name: described(tensors, name) for name, tensors in held.items()}
            write_tensors(beside, shapes, lambda name: held[name][name], told)
            settle(beside, place)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> "Statistics":
        """Open what `save` wrote; moments are read when they are asked for."""
        file = TensorFile(path)
        notes = json.loads(file.notes.get("attnopt", "null"))
        if not isinstance(notes, dict) or notes.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no calibration statistics that this attnopt reads (format {FORMAT})"
            )
        refits = Refits()
        for name in notes["refits"]:
            refits[name] = file[f"refit.gram.{name}"], file[f"refit.cross.{name}"]
        return cls(
            weights,
            file,
            notes["owners"],
            notes["counts"],
            {key: (count, total) for key, (count, total) in notes["firsts"].items()},
            notes["tokens"],
            notes["identity"],
            refits=refits,
        )
