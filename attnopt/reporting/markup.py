"""HTML and SVG from values: whatever is not markup already is escaped, without exception.

Names and texts come from models, whose authors are not trusted. A character that cannot be shown,
or that turns the direction of what follows it, becomes a replacement mark.
"""

import html
import math
import re
from collections.abc import Iterable

_UNSHOWN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
_VOID = frozenset({"meta", "br"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = object


def text(value: object) -> Markup:
    """Return a value as markup; only what `tag` made stays as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNSHOWN.sub("\ufffd", str(value)), quote=True))


def joined(parts: Iterable[object]) -> Markup:
    """Return parts one after the other."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; `class_` is class and `stroke_width` is stroke-width, None leaves out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{joined(children)}</{name}>")


def _value(value: object) -> Markup:
    """Return an attribute; a number must be one that a picture can be drawn with."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be drawn")
        return Markup(f"{value:.2f}".rstrip("0").rstrip("."))
    return text(value)
