"""The values that flow through the pipeline: what an attention is, and what to do with it."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class No:
    """A refusal: falsy, with the reason and the place."""

    why: str
    where: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.where}: {self.why}" if self.where else self.why


MaskKind = Literal["none", "causal", "sliding", "chunked", "prefix", "block", "dense"]


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as far as positions decide it.

    `window` counts the keys of a causal sliding window, the query's own included, or the length of
    a chunk or block. A two-sided window sees `window` keys to the left and `right` keys to the
    right of the query (its own counted in neither). `prefix` keys are seen by everyone, the `first`
    keys of a sliding window by every later query.
    """

    kind: MaskKind
    window: int | None = None
    right: int | None = None
    prefix: int | None = None
    first: int | None = None

    def __str__(self) -> str:
        names = ("window", "right", "prefix", "first")
        shown = {name: getattr(self, name) for name in names}
        inner = ", ".join(f"{k}={v}" for k, v in shown.items() if v is not None)
        return f"{self.kind}({inner})" if inner else self.kind


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: how channels pair up, and whether it acts before or after the cache."""

    style: Literal["half", "interleaved", "complex"]
    placement: Literal["before_cache", "after_cache", "no_cache"]
    channels: int


@dataclass(frozen=True)
class Grid:
    """The image that the tokens of a site come from."""

    height: int
    width: int
    leading: int


@dataclass(frozen=True)
class Projection:
    """The rows of a parameter that make one of q, k, v, or the columns that read o.

    `rows[h]` lists, for head h, the index of each channel along the `axis` of the parameter.
    """

    parameter: str
    axis: int
    rows: tuple[tuple[int, ...], ...]
    layout: Literal["linear", "conv1d", "conv", "einsum"]
    bias: str | None = None


@dataclass(frozen=True)
class Site:
    """One attention in a Program: facts only."""

    name: str
    module: str
    kind: Literal["self", "cross"]
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float | None
    mask: Mask
    padded: bool
    bias: Literal["none", "alibi", "relative", "table", "dense"]
    softcap: float | None
    sinks: bool
    rope: Rope | None
    qk_norm: Literal["head", "full", "cosine"] | None
    cached: bool
    grid: Grid | None
    projections: dict[str, Projection] = field(hash=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mlp:
    """One MLP in a Program: neurons, the projections that make each, and the one that reads them.

    `inputs` has one projection where the activation stands alone, two where one gates the other;
    `rows[i]` lists the rows that make neuron i (two of them in a fused gate-up), as the `rows` of
    `down` list the column that reads it.
    """

    name: str
    module: str
    neurons: int
    inputs: tuple[Projection, ...] = field(hash=False)
    down: Projection = field(hash=False)

    @property
    def projections(self) -> dict[str, Projection]:
        """All of its projections by name, the one that reads the neurons last."""
        made = {f"in{i}": p for i, p in enumerate(self.inputs)}
        return {**made, "down": self.down}

    @property
    def gated(self) -> bool:
        """Whether each neuron is made of two rows."""
        return sum(len(p.rows[0]) for p in self.inputs) > 1


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like attention and is not one, or could not be read as one."""

    module: str
    node: str
    why: str


@dataclass(frozen=True)
class Choice:
    """What to do at one site, and why."""

    site: str
    rewrite: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """The choices for a program, with the goal they serve and what they were made from.

    `statistics` is what calibration saw; a plan from a file reads it from `source` when needed.
    `search` is what was measured on the way to it (`attnopt.search.Found`), where that was done.
    """

    choices: tuple[Choice, ...]
    goal: dict[str, Any] = field(default_factory=dict, hash=False)
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)
    statistics: Any = field(default=None, compare=False, repr=False)
    source: str | None = field(default=None, compare=False, repr=False)
    search: Any = field(default=None, compare=False, repr=False)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the plan as YAML, its statistics beside it."""
        from attnopt.plans import write_plan

        write_plan(self, path)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Plan":
        """Read a plan that `save` wrote, or that somebody edited."""
        from attnopt.plans import read_plan

        return read_plan(path)
