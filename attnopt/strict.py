"""YAML that is read strictly: every mistake is told with its file and line, and nothing is guessed.

What may stand in a file is said by kinds, which read nodes and describe themselves as JSON Schema
for editors. Plain values only: no tags, no aliases, no dates, no key twice.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

LARGEST = 2**20
_TAG = "tag:yaml.org,2002:"
_TAGS = (
    "seq",
    "map",
    "str",
    "null",
    "bool",
    "int",
    "float",
    "timestamp",
    "value",
    "merge",
    "binary",
)


@dataclass(frozen=True)
class Spot:
    """A node of a file, with the place that it stands in."""

    node: yaml.Node
    place: Path

    @property
    def line(self) -> int:
        """Its line, counted from 1."""
        return int(self.node.start_mark.line) + 1

    def wrong(self, why: str) -> ValueError:
        """Return an error that names the file and the line."""
        return ValueError(f"{self.place}:{self.line} {why}")

    def at(self, node: yaml.Node) -> "Spot":
        """Return another node of the same file."""
        return Spot(node, self.place)


class Kind(Protocol):
    """What may stand somewhere."""

    def read(self, spot: Spot) -> Any:
        """Return the value of a node; ValueError where it is of another kind."""
        ...

    def schema(self) -> dict[str, Any]:
        """Describe the kind as JSON Schema."""
        ...


def opened(path: str | Path, what: str) -> Spot:
    """Compose a file; ValueError where it is missing, huge, or no YAML."""
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"no {what} at {place}")
    if place.stat().st_size > LARGEST:
        raise ValueError(f"{place} is larger than any {what} (1 MiB)")
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = place.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}:{line} is not YAML: it is no UTF-8 text") from error
    return composed(text, place, what)


def composed(text: str, place: Path, what: str) -> Spot:
    """Compose a text that stands for a file."""
    try:
        tree = yaml.compose(text, Loader=_NoAliases)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{place}:{_line_of(error, text)} is not YAML: {' '.join(str(error).split())}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place}:1 is not YAML of a {what}: it is nested too deeply") from error
    if tree is None:
        raise ValueError(f"{place}:1 is empty; a {what} is a mapping of keys to values")
    return Spot(tree, place)


def _line_of(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    position = getattr(error, "position", None)
    return text[:position].count("\n") + 1 if isinstance(position, int) else 1


class _NoAliases(yaml.SafeLoader):
    """A loader that refuses aliases, which can make a small file huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is no alias."""
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias is not allowed here", problem_mark=mark)
        return super().compose_node(parent, index)


# ------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Plain:
    """Any plain value: text, a number, yes or no, nothing, and lists and mappings of them.

    With `twice` the last of two equal keys counts, as in other YAML.
    """

    twice: bool = False

    def read(self, spot: Spot) -> Any:
        """Return the value."""
        if not str(spot.node.tag).startswith(_TAG) or str(spot.node.tag)[len(_TAG) :] not in _TAGS:
            raise spot.wrong(f"is not YAML of plain values: it has the tag {spot.node.tag}")
        match spot.node:
            case yaml.SequenceNode(value=items):
                return [self.read(spot.at(item)) for item in items]
            case yaml.MappingNode(value=pairs):
                return {
                    name: self.read(value)
                    for name, _, value in entries(spot, pairs, twice=self.twice)
                }
            case yaml.ScalarNode():
                return _scalar(spot)
            case _:
                raise spot.wrong("is not YAML of plain values")

    def schema(self) -> dict[str, Any]:
        """Describe anything."""
        return {}


def _scalar(spot: Spot) -> Any:
    text, tag = str(spot.node.value), str(spot.node.tag).removeprefix(_TAG)
    match tag:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() in ("true", "yes", "on")
        case "int" if text.lstrip("+-").isdecimal() and len(text) < 20:
            return int(text)
        case "float":
            return _float(text, spot)
        case _:
            raise spot.wrong(
                f"is not YAML of plain values: {text!r} would be read as {tag}; put it in quotes, "
                "or write a plain number"
            )


def _float(text: str, spot: Spot) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise spot.wrong(f"{text!r} is no number; write it like 0.5") from error
    if not math.isfinite(number):
        raise spot.wrong(f"{text!r} is no number that can be used here")
    return number


@dataclass(frozen=True)
class Text:
    """A text; `check` raises ValueError for one that does not serve."""

    check: Callable[[str], Any] | None = None
    what: str = "a text"
    empty: bool = False

    def read(self, spot: Spot) -> str:
        """Return the text."""
        value = Plain().read(spot)
        if not isinstance(value, str) or not (value or self.empty):
            raise spot.wrong(f"{_said(value)} is not {self.what}")
        if self.check is not None:
            _checked(spot, lambda: self.check and self.check(value))
        return value

    def schema(self) -> dict[str, Any]:
        """Describe a text."""
        return {"type": "string"} if self.empty else {"type": "string", "minLength": 1}


@dataclass(frozen=True)
class Whole:
    """A whole number between two others."""

    least: int = 0
    most: int = 2**31

    def read(self, spot: Spot) -> int:
        """Return the number."""
        value = Plain().read(spot)
        if not isinstance(value, int) or isinstance(value, bool):
            raise spot.wrong(f"{_said(value)} is no whole number; write one from {self.least} on")
        if not self.least <= value <= self.most:
            raise spot.wrong(f"{value} must be from {self.least} to {self.most}")
        return value

    def schema(self) -> dict[str, Any]:
        """Describe the number."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Share:
    """A share, such as 50% or 0.5; `check` raises ValueError for one that does not serve."""

    check: Callable[[Any], float]

    def read(self, spot: Spot) -> float:
        """Return the share as a number."""
        value = Plain().read(spot)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise spot.wrong(f"{_said(value)} is no share; write 50% or 0.5")
        found: float = _checked(spot, lambda: self.check(value))
        return found

    def schema(self) -> dict[str, Any]:
        """Describe a number, or a text with a percent sign."""
        percent = {"type": "string", "pattern": r"^\s*[0-9.eE+-]+%?\s*$"}
        return {"anyOf": [{"type": "number"}, percent]}


@dataclass(frozen=True)
class Items:
    """A list of one kind."""

    kind: Kind
    least: int = 0

    def read(self, spot: Spot) -> list[Any]:
        """Return the values in order."""
        if not isinstance(spot.node, yaml.SequenceNode):
            raise spot.wrong(
                "must be a list: items on lines with a dash, or all of them in brackets"
            )
        if len(spot.node.value) < self.least:
            raise spot.wrong(f"must have at least {self.least} item")
        return [self.kind.read(spot.at(item)) for item in spot.node.value]

    def schema(self) -> dict[str, Any]:
        """Describe the list."""
        found: dict[str, Any] = {"type": "array", "items": self.kind.schema()}
        return {**found, "minItems": self.least} if self.least else found


@dataclass(frozen=True)
class Free:
    """A mapping of any names to plain values; `twice`: see `Plain`."""

    twice: bool = False

    def read(self, spot: Spot) -> dict[str, Any]:
        """Return the mapping."""
        if not isinstance(spot.node, yaml.MappingNode):
            raise spot.wrong("must be a mapping of names to values")
        found: dict[str, Any] = Plain(self.twice).read(spot)
        return found

    def schema(self) -> dict[str, Any]:
        """Describe any mapping."""
        return {"type": "object"}


@dataclass(frozen=True)
class Key:
    """A key of a mapping, the kind of its value, and what it is for."""

    name: str
    kind: Kind
    about: str = ""
    required: bool = False


@dataclass(frozen=True)
class Keys:
    """A mapping of known keys; every other key is a mistake."""

    keys: tuple[Key, ...]
    least: int = 0

    def read(self, spot: Spot) -> dict[str, Any]:
        """Return the values by key; keys that are not there are left out."""
        names = [key.name for key in self.keys]
        if not isinstance(spot.node, yaml.MappingNode):
            raise spot.wrong(f"must be a mapping with {', '.join(names)}")
        kinds = {key.name: key.kind for key in self.keys}
        found: dict[str, Any] = {}
        for name, where, value in entries(spot, spot.node.value):
            if name not in kinds:
                raise where.wrong(f"unknown key {name!r}{nearest(name, names)}")
            found[name] = kinds[name].read(value)
        missing = [key.name for key in self.keys if key.required and key.name not in found]
        if missing:
            raise spot.wrong(f"lacks the key {missing[0]!r}")
        if len(found) < self.least:
            raise spot.wrong(f"must have at least {self.least} of {', '.join(names)}")
        return found

    def schema(self) -> dict[str, Any]:
        """Describe the mapping."""
        described = {
            key.name: {**key.kind.schema(), **({"description": key.about} if key.about else {})}
            for key in self.keys
        }
        found = {"type": "object", "properties": described, "additionalProperties": False}
        required = [key.name for key in self.keys if key.required]
        found |= {"required": required} if required else {}
        return found | ({"minProperties": self.least} if self.least else {})


def entries(
    spot: Spot, pairs: Sequence[tuple[yaml.Node, yaml.Node]], *, twice: bool = False
) -> list[tuple[str, Spot, Spot]]:
    """Return the keys of a mapping with their places and values; each is a text."""
    found: dict[str, tuple[str, Spot, Spot]] = {}
    for key, value in pairs:
        where = spot.at(key)
        name = _scalar(where) if isinstance(key, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise where.wrong(f"{_said(name)} is no key; a key is a text")
        if name in found and not twice:
            raise where.wrong(f"has {name!r} twice")
        found[name] = (name, where, spot.at(value))
    return list(found.values())


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Suggest the nearest name, or list all of them."""
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(allowed)}"


def _checked(spot: Spot, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except ValueError as error:
        raise spot.wrong(str(error)) from error


def _said(value: Any) -> str:
    if value is None:
        return "nothing"
    return (
        "a list"
        if isinstance(value, list)
        else ("a mapping" if isinstance(value, Mapping) else repr(value))
    )
