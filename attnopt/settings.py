"""Settings of passes as files say them: known by name, and of the types that their Config has."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from attnopt import passes as registry
from attnopt.strict import nearest


def check_settings(rewrite: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that a pass does not have, or of another type."""
    made = registry.load(rewrite).Config
    hints = typing.get_type_hints(made)
    allowed = [f.name for f in dataclasses.fields(made)]
    for name, value in config.items():
        if name not in allowed:
            raise ValueError(f"pass {rewrite!r} has no setting {name!r}{nearest(name, allowed)}")
        if not _is(value, hints[name]):
            raise ValueError(
                f"setting {name!r} of pass {rewrite!r} takes {_said(hints[name])}, not {value!r}"
            )


def settings_of(rewrite: str) -> tuple[str, ...]:
    """Return the names of a pass's settings."""
    return tuple(f.name for f in dataclasses.fields(registry.load(rewrite).Config))


def _is(value: Any, hint: Any) -> bool:
    """Whether a plain value serves as a type; types that files do not know serve any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, a) for a in arguments)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inner = next((a for a in arguments if a is not Ellipsis), Any)
        return isinstance(value, list | tuple) and all(_is(v, inner) for v in value)
    match hint:
        case types.NoneType:
            return value is None
        case _ if hint is bool or hint is str:
            return isinstance(value, hint)
        case _ if hint is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case _ if hint is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return True


def _said(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    names = {int: "a whole number", float: "a number", bool: "yes or no", str: "a text"}
    if origin is not None:
        return "a list"
    return "nothing (null)" if hint is types.NoneType else names.get(hint, str(hint))
