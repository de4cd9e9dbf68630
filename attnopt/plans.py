"""A plan as a YAML file: written in full, read back strictly."""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from attnopt.nouns import Choice, Plan

FORMAT = 1
_LARGEST = 2**20
_TOP = ("attnopt", "goal", "provenance", "choices")
_CHOICE = ("site", "pass", "config", "why")


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
    if not place.is_file():
        raise ValueError(f"no plan at {place}")
    if place.stat().st_size > _LARGEST:
        raise ValueError(f"{place} is larger than any plan (1 MiB)")
    try:
        text = place.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=_NoAliases)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(tree, yaml.MappingNode):
        raise ValueError(f"{place} holds no plan: a mapping with {', '.join(_TOP)}")
    _check_keys(tree, _TOP, place)
    if content.get("attnopt") != FORMAT:
        raise ValueError(f"{place} has format {content.get('attnopt')!r}; this attnopt reads 1")
    listed = _mappings(content, tree, "choices", place)
    choices = tuple(_choice(c, node, place) for c, node in listed)
    goal, provenance = (content.get(k) or {} for k in ("goal", "provenance"))
    for name, value in (("goal", goal), ("provenance", provenance)):
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {name} must be a mapping")
    stored = statistics_path(place)
    return Plan(choices, goal, provenance, source=str(stored) if stored.is_file() else None)


class _NoAliases(yaml.SafeLoader):
    """A loader that refuses aliases, which can make a small file huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is no alias."""
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases are not allowed in a plan")
        return super().compose_node(parent, index)


def _mappings(
    content: Mapping[str, Any], tree: yaml.MappingNode, key: str, place: Path
) -> Iterable[tuple[dict[str, Any], yaml.MappingNode]]:
    listed = content.get(key)
    node = next((v for k, v in tree.value if k.value == key), None)
    if not isinstance(listed, list) or not isinstance(node, yaml.SequenceNode):
        raise ValueError(f"{place}: {key} must be a list")
    for value, inner in zip(listed, node.value, strict=True):
        if not isinstance(value, dict):
            raise ValueError(f"{place}:{inner.start_mark.line + 1} must be a mapping")
        yield value, inner


def _choice(given: dict[str, Any], node: yaml.MappingNode, place: Path) -> Choice:
    _check_keys(node, _CHOICE, place)
    line = node.start_mark.line + 1
    site, rewrite = given.get("site"), given.get("pass")
    config = given.get("config") or {}
    if not isinstance(site, str) or not isinstance(rewrite, str) or not isinstance(config, dict):
        raise ValueError(f"{place}:{line} a choice names a site, a pass and its config")
    return Choice(site, rewrite, config, str(given.get("why") or ""))


def _check_keys(node: yaml.MappingNode, allowed: tuple[str, ...], place: Path) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(f"{place}:{line} has {key.value!r} twice")
        seen.add(key.value)
        if key.value not in allowed:
            near = difflib.get_close_matches(key.value, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(allowed)}"
            raise ValueError(f"{place}:{line} unknown key {key.value!r}{hint}")
