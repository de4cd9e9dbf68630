"""A kernel with all that it is called with: run where its tensors are, or compiled for any chip."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


class Sizes(NamedTuple):
    """How large a call is; a group is the number of query heads that share a key or value head."""

    heads: int
    queries: int
    keys: int
    k_group: int
    v_group: int


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it run, and its arguments by name."""

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Return what the compiler is told beside the arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def run(self) -> None:
        """Run it on the device of its tensors."""
        first = next(x for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device_of(first):
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def padded_width(width: int) -> int:
    """Return how many channels a kernel holds for so many."""
    return max(16, 1 << (width - 1).bit_length())


def rows_within(tile: int, most: int) -> int:
    """Return the largest power of two that divides a tile, up to so many rows."""
    return min(most, tile & -tile)


def rows_for(count: int, most: int) -> int:
    """Return how many rows, a power of two from 16, hold so many, up to a limit."""
    return min(most, max(16, 1 << (count - 1).bit_length()))


def cut(whole: int, part: int) -> int:
    """Return in how many parts something is cut; the last may be smaller."""
    return -(-whole // part)


def scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Return the factor of a raw score and the cap, so that scores come out in base two.

    Without a cap a score is x * scale * log2(e); with one c * log2(e) * tanh(x * scale / c).
    """
    if softcap is None:
        return scale * LOG2_E, None
    return scale / softcap, softcap * LOG2_E
