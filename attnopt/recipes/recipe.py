"""A recipe: goals, what may be done where, and the data; read from YAML, errors with lines."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from attnopt import passes as registry
from attnopt.goals import BUDGETS, GOALS, checked_goal
from attnopt.recipes.builtin import builtin_text, names
from attnopt.search.rules import Rule
from attnopt.settings import check_settings, settings_of
from attnopt.strict import (
    Free,
    Items,
    Key,
    Keys,
    Share,
    Spot,
    Text,
    Whole,
    composed,
    entries,
    nearest,
    opened,
)

FORMAT = 1
DATA = "stdlib:48x256"
HELD_OUT = 96


@dataclass(frozen=True)
class Recipe:
    """What is wanted; `rules` keep sites as they are, or say what is tried there."""

    goal: Mapping[str, float] = field(default_factory=dict, hash=False)
    tier: int | None = None
    passes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    tensor_parallel: int = 1
    tokens: int | None = None
    data: str = DATA
    held_out: int = HELD_OUT
    seed: int = 0
    description: str = ""


def recipe_of(name: str) -> Recipe:
    """Read a recipe by its file, or one that comes with attnopt by its name."""
    if name in names():
        return _read(composed(builtin_text(name), Path(f"{name}.yaml"), "recipe"))
    if Path(name).is_file():
        return read_recipe(name)
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"no recipe {name!r}, neither a file nor one of attnopt's own{hint} "
        f"(attnopt recipes lists them)"
    )


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a file; whatever a recipe does not have is an error with its line."""
    return _read(opened(path, "recipe"))


def recipe_text(recipe: Recipe) -> str:
    """Return the YAML of a recipe, which reads back as the same."""
    keep = [_rule_said(r) for r in recipe.rules if r.keep]
    tried = [_rule_said(r) for r in recipe.rules if not r.keep]
    content = {
        "attnopt": FORMAT,
        "description": recipe.description or None,
        "goal": dict(recipe.goal),
        "tier": recipe.tier,
        "passes": list(recipe.passes) or None,
        "keep": keep or None,
        "try": tried or None,
        "tensor_parallel": recipe.tensor_parallel if recipe.tensor_parallel > 1 else None,
        "tokens": recipe.tokens,
        "data": recipe.data,
        "held_out": recipe.held_out,
        "seed": recipe.seed,
    }
    said = {name: value for name, value in content.items() if value is not None}
    text: str = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100)
    return text


def _rule_said(rule: Rule) -> dict[str, Any]:
    said: dict[str, Any] = {"sites": rule.sites}
    said |= {} if rule.layers is None else {"layers": list(rule.layers)}
    said |= {} if rule.passes is None else {"passes": list(rule.passes)}
    return said | ({"config": dict(rule.config)} if rule.config else {})


def _share(name: str) -> Share:
    return Share(lambda value: checked_goal({name: value})[name])


def _known_pass(name: str) -> None:
    if name not in registry.names():
        near = difflib.get_close_matches(name, registry.names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown pass {name!r}{hint} (attnopt passes lists all)")
    if _is_exact(name):
        raise ValueError(f"pass {name!r} is always used, and no choice of a plan")


def _source(text: str) -> None:
    from attnopt.data.sources import Source

    Source.parse(text)


_PASS = Text(check=_known_pass, what="the name of a pass")
_SITES = Key("sites", Text(what="a pattern of names"), "a pattern of site names, such as *.mlp")
_LAYERS = Key("layers", Items(Whole(0, 100_000), 1), "numbers of layers, counted from 0")
_KEEP = Keys((_SITES, _LAYERS), least=1)
_TRY = Keys(
    (
        _SITES,
        _LAYERS,
        Key("passes", Items(_PASS, 1), "the passes that are tried there, and no others"),
        Key("config", Free(), "settings of these passes that are fixed there"),
    ),
    least=1,
)


@dataclass(frozen=True)
class _Trying:
    """What is tried at some sites: settings must be those of the passes."""

    keys: Keys

    def read(self, spot: Spot) -> dict[str, Any]:
        """Return the values by key."""
        found = self.keys.read(spot)
        config = found.get("config", {})
        passes = found.get("passes") or [n for n in registry.names() if not _is_exact(n)]
        for name, value in config.items():
            having = [p for p in passes if name in settings_of(p)]
            where = next(s for n, s, _ in _within(spot, "config") if n == name)
            if not having:
                known = sorted({n for p in passes for n in settings_of(p)})
                raise where.wrong(
                    f"no pass tried there has a setting {name!r}{nearest(name, known)}"
                )
            for rewrite in having:
                try:
                    check_settings(rewrite, {name: value})
                except ValueError as error:
                    raise where.wrong(str(error)) from error
        return found

    def schema(self) -> dict[str, Any]:
        """Describe the mapping."""
        return self.keys.schema()


def _within(spot: Spot, name: str) -> list[tuple[str, Spot, Spot]]:
    """Return the entries of the mapping under a key."""
    value = next(v for n, _, v in entries(spot, spot.node.value) if n == name)
    return entries(value, value.node.value)


@cache
def _is_exact(name: str) -> bool:
    return registry.describe(name).exact is True


_GOAL = Keys(
    tuple(
        Key(name, _share(name), f"how much may stay of {BUDGETS[name]}")
        if name in BUDGETS
        else Key(name, _share(name), "how much the held-out loss may rise")
        for name in GOALS
    ),
    least=1,
)
SHAPE = Keys(
    (
        Key("attnopt", Whole(FORMAT, FORMAT), "the version of this format", required=True),
        Key("description", Text(), "what the recipe is for"),
        Key("goal", _GOAL, "budgets, as shares of what the source takes", required=True),
        Key(
            "tier",
            Whole(0, 2),
            "0 a stock checkpoint, 1 layers differ, 2 a saved program; 0 where that stays within "
            "max_drop, or else 2, if left out",
        ),
        Key("passes", Items(_PASS, 1), "the passes to choose among; all of them if left out"),
        Key("keep", Items(_KEEP, 1), "sites that stay as they are"),
        Key(
            "try",
            Items(_Trying(_TRY), 1),
            "what is tried at some sites; the first rule that fits decides",
        ),
        Key("tensor_parallel", Whole(1, 1024), "devices that heads and neurons divide among"),
        Key("tokens", Whole(1), "the length of text that the plan is for"),
        Key("data", Text(check=_source), "what to calibrate with, NAME[:ROWSxTOKENS]"),
        Key("held_out", Whole(2, 1_000_000), "rows to judge by"),
        Key("seed", Whole(0), "the order of the text"),
    )
)


def _read(spot: Spot) -> Recipe:
    found = SHAPE.read(spot)
    rules = [_rule(r, keep=True) for r in found.pop("keep", [])]
    rules += [_rule(r, keep=False) for r in found.pop("try", [])]
    goal = found.pop("goal")
    if not set(goal) & set(BUDGETS):
        raise spot.wrong(f"the goal names no budget; there is {', '.join(BUDGETS)}")
    del found["attnopt"]
    passes = tuple(found.pop("passes", ()))
    return Recipe(goal, passes=passes, rules=tuple(rules), **found)


def _rule(said: Mapping[str, Any], *, keep: bool) -> Rule:
    layers, passes = said.get("layers"), said.get("passes")
    return Rule(
        said.get("sites", "*"),
        None if layers is None else tuple(layers),
        keep,
        None if passes is None else tuple(passes),
        said.get("config", {}),
    )
