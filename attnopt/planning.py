"""Planning: which pass to use at which site, for a goal that the user states."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnopt import passes as registry
from attnopt.calibrating import Statistics, calibrate
from attnopt.nouns import Choice, No, Plan, Site
from attnopt.program import Program

GOALS = ("kv_cache", "max_drop")
_LATER = ("params", "flops", "latency")


class NothingToDoError(ValueError):
    """No rewrite serves the goal; the message says what stands in the way."""


@torch.no_grad()
def plan(
    program: Program,
    goal: Mapping[str, Any] | None = None,
    data: Any = None,
    passes: Sequence[str] | None = None,
    *,
    statistics: Statistics | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose a rewrite for every site so that the goal is met with the least change.

    Uniform plans so far: one number of key and value heads for all sites.
    """
    wanted = checked_goal(goal or {})
    chosen = search(program, wanted, passes)
    if statistics is None:
        statistics = calibrate(program, data)
    choices = tuple(_explained(option, statistics) for option in chosen)
    return Plan(choices, wanted, dict(provenance or {}), statistics=statistics)


def search(
    program: Program, goal: Mapping[str, float], passes: Sequence[str] | None = None
) -> list["_Option"]:
    """Choose a setting for every site from what the sites are; no data is read."""
    if "kv_cache" not in goal:
        raise ValueError("a goal needs kv_cache, such as {'kv_cache': 0.5}: half of the cache")
    return _uniform(program.sites, _options(program, passes), goal["kv_cache"])


def checked_goal(goal: Mapping[str, Any]) -> dict[str, float]:
    """Return the goal as fractions; an unknown or impossible one is a ValueError."""
    for name in goal:
        if name in _LATER:
            raise ValueError(f"goal {name!r} is not served yet; there is {', '.join(GOALS)}")
        if name not in GOALS:
            raise ValueError(f"unknown goal {name!r}; there is {', '.join(GOALS)}")
    found = {name: fraction(value, name) for name, value in goal.items() if value is not None}
    if not 0 < found.get("kv_cache", 1.0) <= 1:
        raise ValueError(f"kv_cache {goal['kv_cache']!r} must be above 0 and at most 100%")
    if found.get("max_drop", 0.0) < 0:
        raise ValueError(f"max_drop {goal['max_drop']!r} must not be negative")
    return found


def fraction(value: Any, name: str) -> float:
    """Read 0.5 or "50%"."""
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"{name} {value!r} is no fraction; write 50% or 0.5") from error
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} {value!r} is no fraction; write 50% or 0.5")
    return number


@dataclass(frozen=True)
class _Option:
    """One pass with one setting at one site, and the cache that it leaves."""

    site: Site
    rewrite: str
    config: Any
    cache: float


def _options(program: Program, names: Sequence[str] | None) -> dict[str, list[_Option]]:
    """Ask every pass for what it could do at each site that has a cache."""
    found: dict[str, list[_Option]] = {}
    refusals: list[No] = []
    for site in program.sites:
        if not site.cached:
            continue
        options: list[_Option] = []
        for name in names or registry.names():
            module: Any = registry.load(name)
            if module.exact or not hasattr(module, "candidates"):
                continue
            for config in module.candidates(site):
                fits = module.fits(site, config)
                if isinstance(fits, No):
                    refusals.append(fits)
                    continue
                elements = module.cost(site, config, None)["kv_elements_per_token"]
                options.append(_Option(site, name, config, elements))
        found[site.name] = options
    if not found:
        raise NothingToDoError("no attention of this program keeps a cache of keys and values")
    stuck = [name for name, options in found.items() if not options]
    if stuck:
        why = next((str(r) for r in refusals if r.where == stuck[0]), "no pass applies")
        more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
        raise NothingToDoError(f"the cache of {stuck[0]}{more} cannot shrink: {why}")
    return found


def _uniform(
    sites: Sequence[Site], options: Mapping[str, list[_Option]], share: float
) -> list[_Option]:
    """Choose the same setting at every site: the weakest that meets the goal."""
    full = {s.name: s.kv_heads * (s.head_dim + s.v_head_dim) for s in sites}
    first = next(iter(options.values()))
    for wanted in first:
        chosen = [_same(wanted, held) for held in options.values()]
        used = sum(o.cache for o in chosen if o is not None)
        if all(chosen) and used <= share * sum(full[n] for n in options) * (1 + 1e-9):
            return [o for o in chosen if o is not None]
    least = min(o.cache for o in first) / full[first[0].site.name]
    raise NothingToDoError(
        f"no uniform plan leaves {share:.4g} of the cache; the least is {least:.4g} (--kv-cache "
        f"{least:.4%})"
    )


def _same(wanted: _Option, held: Sequence[_Option]) -> _Option | None:
    return next(
        (o for o in held if o.rewrite == wanted.rewrite and o.config == wanted.config), None
    )


def _explained(option: _Option, statistics: Statistics) -> Choice:
    module: Any = registry.load(option.rewrite)
    why = f"leaves {option.cache:g} elements of cache a token"
    if hasattr(module, "damage"):
        why += f"; predicted error {module.damage(option.site, statistics, option.config):.4f}"
    return Choice(option.site.name, option.rewrite, dataclasses.asdict(option.config), why)
