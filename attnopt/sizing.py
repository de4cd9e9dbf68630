"""How large things are: the weights that a rewrite removes, and the artifact that is left of them.

A rewrite is given as a plan, or, before there is one, as the goal that it will meet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from attnopt.heads import removable
from attnopt.nouns import Mlp, Plan, Site
from attnopt.program import Program
from attnopt.weights import described

_CARRIED: Final = ("token", "vocab", "merges", "special", "added", "chat", "generation", "prepro")
_WORDS, _WORDS_A_PLACE = 12_000, 2_800


@dataclass(frozen=True)
class Reader:
    """A projection that is solved anew: its inputs before and after, and its outputs."""

    name: str
    width: int
    left: int
    outputs: int


@dataclass(frozen=True)
class Rewrite:
    """What becomes of a program: by a plan, or as far as a goal tells."""

    program: Program
    goal: Mapping[str, float]
    plan: Plan | None

    @cached_property
    def things(self) -> tuple[Site | Mlp, ...]:
        """All that can be rewritten."""
        return (*self.program.main.sites, *self.program.main.mlps)

    @cached_property
    def _chosen(self) -> dict[str, Mapping[str, Any]] | None:
        return None if self.plan is None else {c.site: c.config for c in self.plan.choices}

    @cached_property
    def refitted(self) -> tuple[Reader, ...]:
        """The projections that are solved anew."""
        return tuple(r for r in map(self._refit, self.things) if r is not None)

    def _refit(self, thing: Site | Mlp) -> Reader | None:
        """Return how a thing's last projection is solved anew; None where it stays."""
        last = thing.down if isinstance(thing, Mlp) else thing.projections.get("o")
        left = self._left(thing)
        if last is None or left is None:
            return None
        shape = described(self.program.main.weights, last.parameter).shape
        width = shape[last.axis]
        return Reader(last.parameter, width, round(left * width), math.prod(shape) // width)

    def _left(self, thing: Site | Mlp) -> float | None:
        """Return the share of a projection's inputs that is left; None where it stays."""
        if self._chosen is not None:
            return _left_by(thing, self._chosen.get(thing.name))
        if "params" in self.goal:
            return 1 - (1 - self.goal["params"]) / max(self._removable_share, 1e-9)
        if "kv_cache" in self.goal and isinstance(thing, Site) and thing.cached:
            return 1.0
        return None

    @cached_property
    def _removable_share(self) -> float:
        main = self.program.main
        sizes = [removable(thing, main.weights) for thing in self.things]
        return sum(unit * count for unit, count in sizes) / max(elements(main), 1)

    def removed_bytes(self) -> float:
        """Return the bytes of weights that go."""
        main = self.program.main
        size = held_bytes(main) / max(elements(main), 1)
        if self._chosen is not None:
            return size * sum(_removed(t, self._chosen.get(t.name), main) for t in self.things)
        if "params" in self.goal:
            return size * (1 - self.goal["params"]) * elements(main)
        if "kv_cache" in self.goal:
            cached = [s for s in self.things if isinstance(s, Site) and s.cached]
            keys = sum(_rows_size(s, n, main) for s in cached for n in ("k", "v"))
            return size * (1 - self.goal["kv_cache"]) * keys
        return 0.0

    def artifact_bytes(self, statistics: int) -> int:
        """Return what the artifact takes on disk, with so many bytes of statistics in it."""
        from attnopt.artifacts.saving import source_folder

        folder = source_folder(self.program)
        if folder is None:
            weights, others = float(held_bytes(self.program)), 0
        else:
            sizes = {p: p.stat().st_size for p in folder.iterdir() if p.is_file()}
            weights = float(sum(n for p, n in sizes.items() if p.suffix == ".safetensors"))
            others = sum(n for p, n in sizes.items() if p.name.startswith(_CARRIED))
        words = _WORDS + _WORDS_A_PLACE * len(self.things)
        return round(weights - self.removed_bytes() + statistics + others + words)


def _left_by(thing: Site | Mlp, config: Mapping[str, Any] | None) -> float | None:
    """Return the share of a projection's inputs that a choice leaves; None where it stays."""
    if not config or not config.get("refit"):
        return None
    units = thing.neurons if isinstance(thing, Mlp) else thing.kv_heads
    gone = config.get("neurons", 0) if isinstance(thing, Mlp) else config.get("groups", 0)
    return 1 - float(gone) / units


def _removed(thing: Site | Mlp, config: Mapping[str, Any] | None, main: Program) -> float:
    """Return how many weights a choice removes."""
    if not config:
        return 0.0
    if "kv_heads" in config and isinstance(thing, Site):
        left = {n: config.get(f"{n}_heads") or config["kv_heads"] for n in ("k", "v")}
        sizes = {n: _rows_size(thing, n, main) for n in left}
        return float(sum(sizes[n] * (1 - left[n] / thing.kv_heads) for n in left))
    unit, _ = removable(thing, main.weights)
    return float(unit * (config.get("groups", 0) + config.get("neurons", 0)))


def _rows_size(site: Site, name: str, main: Program) -> float:
    """Return the weights of one projection of a site."""
    projection = site.projections.get(name)
    if projection is None:
        return 0.0
    shape = described(main.weights, projection.parameter).shape
    rows = len(projection.rows) * len(projection.rows[0])
    return rows * math.prod(shape) / shape[projection.axis]


def _names(program: Program) -> list[str]:
    """List the parameters, those that are tied once."""
    twins = {name: group[0] for group in program.source.tied for name in group}
    parts = (program, *program.parts.values())
    bound = {b.name for p in parts for b in p.bindings.values() if b.kind == "parameter"}
    return sorted({twins.get(name, name): name for name in sorted(bound)}.values())


def elements(program: Program) -> int:
    """Return how many weights a program has, tied ones once."""
    return sum(math.prod(described(program.weights, n).shape) for n in _names(program))


def held_bytes(program: Program) -> int:
    """Return the bytes of a program's weights, tied ones once."""
    return sum(described(program.weights, n).bytes for n in _names(program))
