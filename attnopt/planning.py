"""Planning: which pass to use at which site, for a goal that the user states."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnopt import passes as registry
from attnopt.budgets import cache_budget
from attnopt.calibrating import Statistics, calibrate
from attnopt.costs import parameters
from attnopt.heads import per_row
from attnopt.nouns import Choice, Mlp, No, Plan, Site
from attnopt.program import Program
from attnopt.refusals import shared
from attnopt.weights import described

GOALS = ("kv_cache", "params", "max_drop")
_LATER = ("flops", "latency")


class NothingToDoError(ValueError):
    """No rewrite serves the goal; the message says what stands in the way."""


@torch.no_grad()
def plan(
    program: Program,
    goal: Mapping[str, Any] | None = None,
    data: Any = None,
    passes: Sequence[str] | None = None,
    *,
    tier: int = 0,
    statistics: Statistics | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose a rewrite for every site so that the goal is met with the least change.

    In tier 0 all layers are treated alike, so that a stock class holds the result. In tier 1 every
    layer has its own numbers of heads, in tier 2 keys and values have numbers of their own: then
    the damage of each is measured on calibration rows.
    """
    wanted = checked_goal(goal or {})
    chosen = search(program, wanted, passes)
    if statistics is None:
        statistics = calibrate(program, data)
    if tier and "kv_cache" in wanted:
        choices = cache_budget(program, statistics, wanted["kv_cache"], decoupled=tier > 1)
    else:
        choices = tuple(_explained(option, statistics) for option in chosen)
    return Plan(choices, wanted, dict(provenance or {}), statistics=statistics)


def search(
    program: Program, goal: Mapping[str, float], passes: Sequence[str] | None = None
) -> list["_Option"]:
    """Choose a uniform setting for every site from what the sites are; no data is read."""
    budgets = [name for name in ("kv_cache", "params") if name in goal]
    if len(budgets) != 1:
        raise ValueError(
            "a goal needs one budget, such as {'kv_cache': 0.5} (half of the cache) or "
            "{'params': 0.8}; for several, optimize the result of the first for the second"
        )
    if "params" in goal:
        return _fewer_parameters(program, goal["params"], passes)
    return _uniform(program.sites, _options(program, passes), goal["kv_cache"])


def checked_goal(goal: Mapping[str, Any]) -> dict[str, float]:
    """Return the goal as fractions; an unknown or impossible one is a ValueError."""
    for name in goal:
        if name in _LATER:
            raise ValueError(f"goal {name!r} is not served yet; there is {', '.join(GOALS)}")
        if name not in GOALS:
            raise ValueError(f"unknown goal {name!r}; there is {', '.join(GOALS)}")
    found = {name: fraction(value, name) for name, value in goal.items() if value is not None}
    for name in ("kv_cache", "params"):
        if not 0 < found.get(name, 1.0) <= 1:
            raise ValueError(f"{name} {goal[name]!r} must be above 0 and at most 100%")
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

    site: Site | Mlp
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
            # What changes no weight leaves the cache as it is.
            if module.exact or not hasattr(module, "candidates") or hasattr(module, "weightless"):
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


def _fewer_parameters(program: Program, share: float, names: Sequence[str] | None) -> list[_Option]:
    """Remove the same share of every layer's heads and neurons, to meet the budget exactly.

    Key heads go with their readers, as many as the share says; neurons make up the difference.
    """
    if names is not None and "amp" not in names:
        raise NothingToDoError("only pass 'amp' removes parameters so far; name it, or none")
    main, amp = program.main, registry.load("amp")
    config: Any = amp.Config
    declined = shared(main)
    both: tuple[Site | Mlp, ...] = (*main.sites, *main.mlps)
    things = [t for t in both if t.name not in declined and amp.fits(t, config()) is True]
    total = sum(p.numel() for p in parameters(main))
    held = {t.name: removable(t, main.weights) for t in things}
    goal = (1 - share) * total
    within = sum(unit * (count - 1) for unit, count in held.values())
    if goal > within:
        raise NothingToDoError(
            f"heads and neurons are {within / total:.1%} of the parameters, so {share:.4g} cannot "
            f"be reached; the least is {1 - within / total:.4g} (--params {1 - within / total:.4%})"
        )
    part = goal / sum(unit * count for unit, count in held.values())
    removed: dict[str, int] = {}
    for thing in things:
        if isinstance(thing, Site):
            count = held[thing.name][1]
            removed[thing.name] = min(round(part * count), count - 1)
    rest = goal - sum(held[name][0] * n for name, n in removed.items())
    mlps = [t for t in things if isinstance(t, Mlp)]
    size = sum(held[m.name][0] * held[m.name][1] for m in mlps)
    for mlp in mlps:
        removed[mlp.name] = max(0, min(round(rest / size * mlp.neurons), mlp.neurons - 1))
    if not any(removed.values()):
        raise NothingToDoError(f"{share:.4g} of the parameters is what there is, to a neuron")
    return [
        _Option(
            t,
            "amp",
            config(refit=True, **{"neurons" if isinstance(t, Mlp) else "groups": n}),
            held[t.name][0] * n,
        )
        for t in things
        if (n := removed[t.name])
    ]


def removable(thing: Site | Mlp, weights: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the parameters of one key head with its readers, or of a neuron, and how many."""
    if isinstance(thing, Mlp):
        units, projections = thing.neurons, (*thing.inputs, thing.down)
    else:
        units, projections = thing.kv_heads, tuple(thing.projections.values())
    size = 0
    for projection in projections:
        shape = described(weights, projection.parameter).shape
        rows = len(projection.rows) * len(projection.rows[0])
        size += rows * math.prod(shape) // shape[projection.axis]
        if per_row(weights, projection):
            size += rows
    return size // units, units


def _explained(option: _Option, statistics: Statistics) -> Choice:
    module: Any = registry.load(option.rewrite)
    why = f"leaves {option.cache:g} elements of cache a token"
    if option.rewrite == "amp":
        why = f"removes {option.cache:,.0f} parameters"
    if hasattr(module, "damage"):
        why += f"; predicted error {module.damage(option.site, statistics, option.config):.4f}"
    return Choice(option.site.name, option.rewrite, dataclasses.asdict(option.config), why)
