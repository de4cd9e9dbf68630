"""A plan as a YAML file: written in full, read back strictly."""

import os
from pathlib import Path
from typing import Any

import yaml

from attnopt.nouns import Choice, Plan
from attnopt.strict import Free, Items, Key, Keys, Plain, Spot, opened

FORMAT = 1


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan, and its statistics beside it."""
    Path(path).write_text(plan_text(plan), encoding="utf-8")
    if plan.statistics is not None:
        plan.statistics.save(statistics_path(path))


def plan_text(plan: Plan) -> str:
    """Return the YAML of a plan; equal plans give equal text."""
    choices = [
        {"site": c.site, "pass": c.rewrite, "config": dict(c.config), "why": c.why}
        for c in plan.choices
    ]
    content = {
        "attnopt": FORMAT,
        "goal": dict(plan.goal),
        "provenance": dict(plan.provenance),
        "choices": choices,
    }
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return text


def statistics_path(path: str | os.PathLike[str]) -> Path:
    """Return where the statistics of a plan lie."""
    return Path(path).with_name("statistics.safetensors")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan; whatever a plan does not have is an error with its line."""
    place = Path(path)
    found = SHAPE.read(opened(place, "plan"))
    choices = tuple(
        Choice(c["site"], c["pass"], c.get("config") or {}, str(c.get("why") or ""))
        for c in found["choices"]
    )
    goal, provenance = (found.get(k) or {} for k in ("goal", "provenance"))
    stored = statistics_path(place)
    return Plan(choices, goal, provenance, source=str(stored) if stored.is_file() else None)


class _Format:
    """The version of the format."""

    def read(self, spot: Spot) -> int:
        """Return the version; ValueError for another than this attnopt's."""
        value = Plain().read(spot)
        if type(value) is not int or value != FORMAT:
            raise spot.wrong(f"has format {value!r}; this attnopt reads {FORMAT}")
        return FORMAT

    def schema(self) -> dict[str, Any]:
        """Describe the number."""
        return {"const": FORMAT}


class _Choices:
    """A choice: a site, a pass, its settings, and why."""

    keys = Keys(
        (
            Key("site", Plain(), "the name of a site of `attnopt inspect`", required=True),
            Key("pass", Plain(), "what is done there, of `attnopt passes`", required=True),
            Key("config", Plain(), "the settings of the pass"),
            Key("why", Plain(), "why this was chosen; nothing reads it"),
        )
    )

    def read(self, spot: Spot) -> dict[str, Any]:
        """Return the choice by key; passes and settings must be there."""
        if not isinstance(spot.node, yaml.MappingNode):
            raise spot.wrong("must be a mapping: a choice names a site, a pass and its config")
        found = self.keys.read(spot)
        if not all(isinstance(found[name], str) for name in ("site", "pass")):
            raise spot.wrong("a choice names a site, a pass and its config")
        config = found.get("config") or {}
        if not isinstance(config, dict):
            raise spot.wrong("a choice names a site, a pass and its config, a mapping")
        return found

    def schema(self) -> dict[str, Any]:
        """Describe the mapping."""
        found = self.keys.schema()
        found["properties"]["site"]["type"] = found["properties"]["pass"]["type"] = "string"
        found["properties"]["config"]["type"] = ["object", "null"]
        return found


SHAPE = Keys(
    (
        Key("attnopt", _Format(), "the version of this format", required=True),
        Key("goal", Free(twice=True), "the goal that the plan was made for"),
        Key("provenance", Free(twice=True), "what the plan was made from"),
        Key("choices", Items(_Choices()), "what is done at each site, in order", required=True),
    )
)
