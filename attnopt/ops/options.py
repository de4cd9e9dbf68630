"""The options of the canonical attention, as its implementations take them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnopt.ops.structure import OPTIONS


@dataclass(frozen=True)
class Options:
    """What a call says besides queries, keys and values; `structure` holds what positions hide."""

    bias: Tensor | None = None
    mask: Tensor | None = None
    padding: Tensor | None = None
    sinks: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    mean_if_blind: bool = False
    k_map: Sequence[int] | None = None
    v_map: Sequence[int] | None = None
    structure: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, given: dict[str, Any]) -> "Options":
        """Take a call's keywords apart; an unknown one is a TypeError."""
        structure = {name: x for name, x in given.items() if name in OPTIONS}
        rest = {name: x for name, x in given.items() if name not in OPTIONS}
        return cls(**rest, structure=structure)

    def heads_of(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the heads of keys and values where the maps say."""
        k = k if self.k_map is None else k[:, list(self.k_map)]
        v = v if self.v_map is None else v[:, list(self.v_map)]
        return k, v
