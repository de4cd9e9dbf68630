"""Candidates: what the passes would do at a site, one after another where that makes sense.

A pass is asked through two functions, both optional. `proposals(site, asked)` lists the settings
worth trying for what is asked, and takes MLPs too; without it `candidates(site)` is taken.
`alike(config)` says what of a setting is the same where another site is treated alike (the setting
itself, unless it says otherwise). A pass whose `follows` names others may come after them; one
that is `far` spoils more the longer the text is, and is not judged on shorter rows.
"""

import dataclasses
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt import passes as registry
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.program import Program
from attnopt.search.rules import Rule, rule_of


@dataclass(frozen=True)
class Asked:
    """What the planner asks a pass for.

    Without `statistics` it only wants to know how many proposals there will be. `goals` names the
    budgets, `tier` is the highest that may hold the result, `tokens` is the length of text that the
    plan is for (0 where there is none), `seen` that of the rows at hand. `before` names the passes
    that the site has behind it: then the statistics are of this site.
    """

    program: Program
    statistics: Statistics | None
    goals: tuple[str, ...]
    tier: int
    tokens: int
    seen: int = 0
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One pass with one setting."""

    rewrite: str
    config: Any

    @property
    def settings(self) -> dict[str, Any]:
        """The setting as JSON values."""
        made: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        return made

    @property
    def said(self) -> str:
        """The pass and what its setting changes of the usual one, for a table."""
        usual = json.loads(json.dumps(dataclasses.asdict(type(self.config)())))
        changed = {n: v for n, v in self.settings.items() if v != usual[n] and n != "refit"}
        inner = ", ".join(f"{n}={v}" for n, v in changed.items())
        return f"{self.rewrite}({inner})"

    @property
    def alike(self) -> Hashable:
        """What is the same where another site is treated alike."""
        module: Any = registry.load(self.rewrite)
        if hasattr(module, "alike"):
            found: Hashable = module.alike(self.config)
            return found
        return json.dumps(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Candidate:
    """What could be done at one site; without steps the site stays as it is."""

    site: str
    steps: tuple[Step, ...] = ()

    @property
    def label(self) -> str:
        """The passes, in their order."""
        return "+".join(step.rewrite for step in self.steps) or "keep"

    @property
    def said(self) -> str:
        """What is done, for a table."""
        return " then ".join(step.said for step in self.steps) or "keep"

    @property
    def key(self) -> str:
        """A name that says all of it."""
        said = [[s.rewrite, s.settings] for s in self.steps]
        return f"{self.site} {json.dumps(said, sort_keys=True)}"

    @property
    def alike(self) -> tuple[Hashable, ...]:
        """What is the same where another site is treated alike."""
        return tuple((step.rewrite, step.alike) for step in self.steps)

    def choices(self, why: str = "", *, refit: bool = True) -> tuple[Choice, ...]:
        """Return this as a plan says it; without `refit` the output projections are left alone."""
        found: list[Choice] = []
        for step in self.steps:
            settings = step.settings
            if not refit and "refit" in settings:
                settings["refit"] = False
            found.append(Choice(self.site, step.rewrite, settings, why))
        return tuple(found)

    def then(self, step: Step) -> "Candidate":
        """Return the same with one more step."""
        return dataclasses.replace(self, steps=(*self.steps, step))


def steps_at(
    thing: Site | Mlp, asked: Asked, names: Sequence[str], rules: Sequence[Rule] = ()
) -> tuple[list[Step], list[No]]:
    """List what the passes propose at a site, and what they decline."""
    rule = rule_of(rules, thing.name)
    if rule is not None and rule.keep:
        return [], [No(f"a rule says: {rule}", thing.name)]
    allowed = names if rule is None or rule.passes is None else rule.passes
    fixed = {} if rule is None else dict(rule.config)
    found: dict[str, Step] = {}
    refused: list[No] = []
    for name in allowed:
        module: Any = registry.load(name)
        if module.exact:
            continue
        if getattr(module, "far", False) and asked.seen < asked.tokens:
            why = f"rows of {asked.seen} tokens say nothing of a text of {asked.tokens}"
            refused.append(No(f"{name}: {why}; give longer rows", thing.name))
            continue
        for config in _with(_proposed(module, thing, asked), fixed):
            answer = _possible(name, module, thing, config, asked)
            if isinstance(answer, No):
                refused.append(answer)
            else:
                found.setdefault(Candidate("", (answer,)).key, answer)
    return list(found.values()), refused


def _saves_cache(module: Any, thing: Site | Mlp, config: Any, tokens: int) -> bool:
    """Whether a pass says of a setting that less is kept of the cache."""
    if isinstance(thing, Mlp):
        return False
    cost = module.cost(thing, config, None)
    kept = cost.get("kv_elements_per_token", 0.0) * tokens + cost.get("kv_elements", 0.0)
    return bool(kept < thing.kv_heads * (thing.head_dim + thing.v_head_dim) * tokens)


def _possible(name: str, module: Any, thing: Site | Mlp, config: Any, asked: Asked) -> Step | No:
    fits = module.fits(thing, config)
    if isinstance(fits, No):
        return No(f"{name}: {fits.why}", fits.where)
    tokens = max(asked.tokens, 1)
    if set(asked.goals) == {"kv_cache"} and not _saves_cache(module, thing, config, tokens):
        return No(f"{name}: it leaves the cache as it is", thing.name)
    tier, needed = asked.tier, registry.tier_of(module, thing, config)
    if needed > tier:
        return No(f"{name}: its result needs tier {needed}, and {tier} is asked for", thing.name)
    return Step(name, config)


def _proposed(module: Any, thing: Site | Mlp, asked: Asked) -> Sequence[Any]:
    if hasattr(module, "proposals"):
        found: Sequence[Any] = module.proposals(thing, asked)
        return found
    if isinstance(thing, Mlp) or not hasattr(module, "candidates"):
        return ()
    listed: Sequence[Any] = module.candidates(thing)
    return listed


def _with(configs: Sequence[Any], fixed: Mapping[str, Any]) -> Iterator[Any]:
    """Yield settings with some of them fixed."""
    for config in configs:
        own = {f.name for f in dataclasses.fields(config)}
        yield dataclasses.replace(config, **{n: v for n, v in fixed.items() if n in own})


def following(name: str, names: Sequence[str]) -> list[str]:
    """List the passes that may come after one at the same site."""
    return [n for n in names if name in getattr(registry.load(n), "follows", ())]
