"""As much of JSON Schema (2020-12) as the schemas of this package use; an unknown word is an error.

https://json-schema.org/draft/2020-12/json-schema-validation
"""

from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}
_SAID = {"$schema", "$id", "$defs", "title", "description", "required", "additionalProperties"}


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """Return what is wrong with a value, each with its place."""
    found: list[str] = []
    for word, given in schema.items():
        if word not in _SAID:
            found += [f"{at or '/'}: {p}" if ":" not in p else p for p in
                      _CHECKS[word](value, given, root, at)]  # fmt: skip
    if isinstance(value, dict):
        found += [f"{at}/{n}: missing" for n in schema.get("required", ()) if n not in value]
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", True)
        for name in value.keys() - known.keys():
            if more is False:
                found.append(f"{at}/{name}: not allowed")
            elif isinstance(more, dict):
                found += problems(value[name], more, root, f"{at}/{name}")
    return found


def _type(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
    names = [given] if isinstance(given, str) else given
    number = isinstance(value, bool) and "boolean" not in names
    if number or not any(isinstance(value, _TYPES[name]) for name in names):
        yield f"{value!r} is no {' or '.join(names)}"


def _properties(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
    for name, inner in given.items():
        if isinstance(value, dict) and name in value:
            yield from problems(value[name], inner, root, f"{at}/{name}")


def _items(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        yield from problems(item, given, root, f"{at}/{number}")


def _any_of(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
    tried = [problems(value, one, root, at) for one in given]
    if all(tried):
        yield from (problem for one in tried for problem in one)


def _ref(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
    yield from problems(value, root["$defs"][given.removeprefix("#/$defs/")], root, at)


def _number(wrong: Any) -> Any:
    def check(value: Any, given: Any, root: Any, at: str) -> Iterator[str]:
        if wrong(value, given):
            yield f"{value!r} against {given!r}"

    return check


_CHECKS = {
    "type": _type,
    "properties": _properties,
    "items": _items,
    "anyOf": _any_of,
    "$ref": _ref,
    "const": _number(lambda v, g: v != g),
    "enum": _number(lambda v, g: v not in g),
    "minimum": _number(lambda v, g: v < g),
    "minItems": _number(lambda v, g: len(v) < g),
    "maxItems": _number(lambda v, g: len(v) > g),
}
