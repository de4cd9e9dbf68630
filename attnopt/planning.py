"""Planning: which pass to use at which site, for a goal that the user states."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnopt import passes as registry
from attnopt.costs import default_workload, parameters
from attnopt.goals import GOALS as GOALS
from attnopt.goals import budgets_of
from attnopt.goals import checked_goal as checked_goal
from attnopt.goals import fraction as fraction
from attnopt.heads import removable
from attnopt.keeping import calibrated, folder_of
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Mlp, No, Plan, Site
from attnopt.program import Program
from attnopt.refusals import NothingToDoError as NothingToDoError
from attnopt.refusals import NoUniformPlanError as NoUniformPlanError
from attnopt.refusals import shared
from attnopt.search.rules import Rule


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
    rules: Sequence[Rule] = (),
    tensor_parallel: int = 1,
    tokens: int | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Plan:
    """Choose a rewrite for every site so that the goal is met with the least change.

    In tier 0 all layers are treated alike, so that a stock class holds the result; for a budget of
    the cache or of parameters alone, the pass is taken that is predicted to damage least, and one
    whose result needs a higher tier only where no other meets it. In tiers 1 and 2, and for other
    goals, every pass is measured at every site, and the best mixture is solved for
    (`attnopt.search`). `rules` keep sites out of it or say what is tried there, head counts divide
    among `tensor_parallel` devices, `tokens` is the length of text that the plan is for (that of
    the rows), and `work` is a directory that keeps statistics and scores for another time.
    """
    wanted = checked_goal(goal or {})
    told = dict(provenance or {})
    found = foreseen(program, wanted, passes, tier, rules, tensor_parallel)
    if found is None:
        from attnopt.search.preparing import Terms, searched

        terms = Terms(tier, tuple(passes or ()), tuple(rules), tensor_parallel, tokens)
        return searched(program, wanted, data, terms, statistics=statistics, told=told, work=work)
    if statistics is None:
        place = None if work is None else folder_of(work, program, data)
        statistics = calibrated(program, data, place)
    spread = _spreading(passes) if "kv_cache" in wanted else None
    if spread is not None:
        length = default_workload(program).sequence
        choices = spread.allocate(program, statistics, wanted["kv_cache"], tokens=length)
    else:
        choices = tuple(o.choice for o in _least_damage(found, statistics, tier))
    return Plan(choices, wanted, told, statistics=statistics)


def _spreading(passes: Sequence[str] | None) -> Any:
    """Return the one pass asked for, where it spreads a budget over heads by itself."""
    module = registry.load(passes[0]) if passes is not None and len(passes) == 1 else None
    return module if hasattr(module, "allocate") else None


def foreseen(
    program: Program,
    goal: Mapping[str, float],
    passes: Sequence[str] | None = None,
    tier: int = 0,
    rules: Sequence[Rule] = (),
    tensor_parallel: int = 1,
) -> "list[list[_Option]] | None":
    """List uniform settings that meet a goal, a pass each, from what the sites are without data.

    None where that does not do, and every site has to be measured.
    """
    budgets = tuple(budgets_of(goal))
    if not budgets:
        raise ValueError(
            "a goal needs one budget at least, such as {'kv_cache': 0.5} (half of the cache) or "
            "{'params': 0.8}"
        )
    if len(budgets) > 1 and not tier:
        raise ValueError(
            f"in tier 0, where all layers are alike, a goal has one budget, not "
            f"{' and '.join(budgets)}; ask for tier 1 or 2, or for one after the other"
        )
    plain = not rules and tensor_parallel == 1 and budgets in (("kv_cache",), ("params",))
    if plain and budgets == ("kv_cache",) and _spreading(passes) is not None:
        return []
    if not plain or tier:
        return None
    if "params" in goal:
        return [fewer_parameters(program, goal["params"], passes)]
    return _uniform(program.sites, _options(program, passes), goal["kv_cache"])


@dataclass(frozen=True)
class _Option:
    """One pass with one setting at one site: the elements that it leaves or removes.

    `left` counts the cache of a token, `removed` weights; `damage` is what the pass predicts.
    """

    site: Site | Mlp
    rewrite: str
    config: Any
    left: float = 0.0
    removed: int = 0
    damage: float | None = None

    @property
    def choice(self) -> Choice:
        """The option as a plan says it."""
        why = f"leaves {self.left:g} elements of cache a token"
        if self.removed:
            why = f"removes {self.removed:,} parameters"
        if self.damage is not None:
            why += f"; predicted error {self.damage:.4f}"
        return Choice(self.site.name, self.rewrite, dataclasses.asdict(self.config), why)

    @property
    def tier(self) -> int:
        """The lowest tier that holds the result."""
        return registry.tier_of(registry.load(self.rewrite), self.site, self.config)


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
            if (
                module.exact
                or not hasattr(module, "candidates")
                or getattr(module, "weightless", False) is True
            ):
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
        why = next((r.why for r in refusals if r.where == stuck[0]), "no pass applies")
        more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
        raise NoUniformPlanError(f"the cache of {stuck[0]}{more} cannot shrink: {why}")
    return found


def _uniform(
    sites: Sequence[Site], options: Mapping[str, list[_Option]], share: float
) -> list[list[_Option]]:
    """List the same setting at every site: of each pass the weakest that meets the goal."""
    full = {s.name: s.kv_heads * (s.head_dim + s.v_head_dim) for s in sites}
    first = next(iter(options.values()))
    found: dict[str, list[_Option]] = {}
    for wanted in (o for o in first if o.rewrite not in found):
        chosen = [_same(wanted, held) for held in options.values()]
        used = sum(o.left for o in chosen if o is not None)
        if all(chosen) and used <= share * sum(full[n] for n in options) * (1 + 1e-9):
            found[wanted.rewrite] = [o for o in chosen if o is not None]
    if found:
        return list(found.values())
    least = min(o.left for o in first) / full[first[0].site.name]
    raise NoUniformPlanError(
        f"no uniform plan leaves {share:.4g} of the cache; the least is {least:.4g} (--kv-cache "
        f"{least:.4%})"
    )


def _same(wanted: _Option, held: Sequence[_Option]) -> _Option | None:
    return next(
        (o for o in held if o.rewrite == wanted.rewrite and o.config == wanted.config), None
    )


def fewer_parameters(program: Program, share: float, names: Sequence[str] | None) -> list[_Option]:
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
            removed=held[t.name][0] * n,
        )
        for t in things
        if (n := removed[t.name])
    ]


def _least_damage(
    found: Sequence[list[_Option]], statistics: Statistics, tier: int
) -> list[_Option]:
    """Choose the pass that is predicted to damage least; one that names no damage comes last."""
    lowest = min(max(tier, *(o.tier for o in options)) for options in found)
    allowed = [options for options in found if all(o.tier <= lowest for o in options)]
    rated = [[_rated(option, statistics) for option in options] for options in allowed]
    return min(rated, key=lambda options: (_sum(options), options[0].rewrite))


def _rated(option: _Option, statistics: Statistics) -> _Option:
    module: Any = registry.load(option.rewrite)
    if not hasattr(module, "damage"):
        return option
    damage = float(module.damage(option.site, statistics, option.config))
    return dataclasses.replace(option, damage=damage)


def _sum(options: Sequence[_Option]) -> float:
    return sum(math.inf if o.damage is None else o.damage for o in options)
