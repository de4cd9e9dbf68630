"""Pictures as inline SVG: a heat map of heads, bars, an interval, a front. Colours come from CSS.

Sizes are in units of about a pixel on a phone; a picture grows with the page.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attnopt.reporting.markup import Markup, joined, tag

WIDTH: Final = 340.0
_CELL: Final = 26.0
_LABEL: Final = 34.0
_SHADES: Final = 5


def heat_map(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw a row per site and a cell per head, the darker the more of its row's mean a head has."""
    columns = max(len(row["scores"]) for row in rows)
    cell = min(_CELL, (2 * WIDTH - _LABEL) / columns)
    shares = [_shares(row["scores"]) for row in rows]
    most = max(max(row) for row in shares)
    cells = [
        tag(
            "rect",
            tag("title", f"{rows[y]['site']}, head {x}: {share:.2f} of the mean of its layer"),
            x=_LABEL + x * cell,
            y=y * cell,
            width=cell - 1,
            height=cell - 1,
            class_="heat",
            fill_opacity=share / most if most else 0.0,
        )
        for y, row in enumerate(shares)
        for x, share in enumerate(row)
    ]
    every = max(math.ceil(14 / cell), 1)
    labels = [
        tag("text", number, x=_LABEL - 6, y=(number + 0.5) * cell + 4, text_anchor="end")
        for number in range(0, len(rows), every)
    ]
    heads = [
        tag("text", number, x=_LABEL + (number + 0.5) * cell, y=bottom, text_anchor="middle")
        for bottom in (len(rows) * cell + 14,)
        for number in range(0, columns, max(math.ceil(22 / cell), 1))
    ]
    size = (_LABEL + columns * cell, len(rows) * cell + 20)
    return _svg("How much each head adds, layer by layer", size, [*cells, *labels, *heads])


def shades(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw what the shades of the heat map mean."""
    most = max(max(_shares(row["scores"])) for row in rows)
    wide = 60.0
    boxes = [
        tag("rect", x=i * wide, y=0.0, width=wide - 1, height=14.0, class_="heat",
            fill_opacity=i / (_SHADES - 1))
        for i in range(_SHADES)
    ]  # fmt: skip
    words = [
        tag("text", f"{most * i / (_SHADES - 1):.2f}", x=(i + 0.5) * wide, y=30.0,
            text_anchor="middle")
        for i in range(_SHADES)
    ]  # fmt: skip
    return _svg("What the shades mean", (_SHADES * wide, 36.0), [*boxes, *words], class_="key")


def _shares(scores: Sequence[float]) -> list[float]:
    """Return scores as multiples of their mean."""
    mean = sum(scores) / len(scores)
    return [score / mean if mean else 0.0 for score in scores]


def pair(before: float, after: float, what: str) -> Markup:
    """Draw two bars, the longer one as wide as the picture."""
    longest = max(before, after) or 1.0
    bars = [
        tag("rect", x=0.0, y=y, width=100.0 * size / longest, height=8.0, class_=kind)
        for y, size, kind in ((0.0, before, "before"), (10.0, after, "after"))
    ]
    return _svg(what, (100.0, 18.0), bars, class_="bars", preserveAspectRatio="none")


def interval(mean: float, low: float, high: float, limit: float | None) -> Markup:
    """Draw a mean with its confidence interval, zero, and the limit that it is compared with."""
    ends = [0.0, low, high, mean, *([] if limit is None else [limit])]
    least, most = min(ends), max(ends)
    span = (most - least) or 1.0

    def at(value: float) -> float:
        return 30 + (WIDTH - 60) * (value - least) / span

    parts = [
        tag("line", x1=20.0, x2=WIDTH - 20, y1=40.0, y2=40.0, class_="axis"),
        tag("line", x1=at(0.0), x2=at(0.0), y1=28.0, y2=52.0, class_="axis"),
        tag("text", "0", x=at(0.0), y=66.0, text_anchor="middle"),
        tag("line", x1=at(low), x2=at(high), y1=40.0, y2=40.0, class_="interval"),
        tag("circle", cx=at(mean), cy=40.0, r=5.0, class_="after"),
        tag("text", f"{mean:+.2%}", x=at(mean), y=26.0, text_anchor="middle"),
    ]
    if limit is not None:
        parts.append(tag("line", x1=at(limit), x2=at(limit), y1=20.0, y2=56.0, class_="limit"))
        told = f"limit {limit:.2%}"
        parts.append(tag("text", told, x=at(limit), y=80.0, text_anchor=_anchor(at(limit))))
    return _svg("The loss of quality and its confidence interval", (WIDTH, 88.0), parts)


def front(points: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw plans by cost and damage, those that no other beats joined by a line."""
    low, high = (f(p["cost"] for p in points) for f in (min, max))
    deepest = max(max(p["damage"] for p in points), 0.0) or 1.0
    left, bottom, top = 46.0, 186.0, 12.0
    wide = (high - low) or 1.0

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        x = left + (WIDTH - left - 24) * (point["cost"] - low) / wide
        return x, bottom - (bottom - top) * max(point["damage"], 0.0) / deepest

    best = sorted(_unbeaten(points), key=lambda p: p["cost"])
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in map(place, best))
    parts = [
        tag("line", x1=left, x2=WIDTH - 14, y1=bottom, y2=bottom, class_="axis"),
        tag("line", x1=left, x2=left, y1=bottom, y2=top - 6, class_="axis"),
        tag("polyline", points=line, class_="front"),
        *(_dot(point, *place(point)) for point in points),
        *_scale(low, high, deepest, left, bottom, top),
    ]
    return _svg("What plans cost and lose", (WIDTH, 226.0), parts)


def _scale(
    low: float, high: float, deepest: float, left: float, bottom: float, top: float
) -> list[Markup]:
    """Write the ends of both axes, and what they are."""
    right = WIDTH - 24
    ends = [(left, low, "middle")] if high == low else [(left, low, "middle"), (right, high, "end")]
    return [
        *(tag("text", f"{v:.3g}", x=x, y=bottom + 16, text_anchor=a) for x, v, a in ends),
        tag("text", f"{deepest:.2g}", x=left - 6, y=top + 4, text_anchor="end"),
        tag("text", "0", x=left - 6, y=bottom + 4, text_anchor="end"),
        tag("text", "share of the budget that is left", x=(left + right) / 2, y=bottom + 34,
            text_anchor="middle"),
    ]  # fmt: skip


def _unbeaten(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        less = a["cost"] < b["cost"] or a["damage"] < b["damage"]
        return bool(less and a["cost"] <= b["cost"] and a["damage"] <= b["damage"])

    return [p for p in points if not any(beats(other, p) for other in points)]


def _dot(point: Mapping[str, Any], x: float, y: float) -> Markup:
    told = f"{point['label']} cost {point['cost']:.4g}, damage {point['damage']:.4g}".strip()
    chosen = bool(point["chosen"])
    return tag("circle", tag("title", told), cx=x, cy=y, r=6.0 if chosen else 3.5,
               class_="chosen" if chosen else "point")  # fmt: skip


def _anchor(x: float) -> str:
    return "end" if x > WIDTH * 0.75 else "start" if x < WIDTH * 0.25 else "middle"


def _svg(what: str, size: tuple[float, float], parts: Sequence[Markup], **more: str) -> Markup:
    box = f"0 0 {size[0]:.2f} {size[1]:.2f}"
    return tag(
        "svg", tag("title", what), joined(parts), viewBox=box, role="img",
        aria_label=what, width=size[0], height=size[1], **more,
    )  # fmt: skip
