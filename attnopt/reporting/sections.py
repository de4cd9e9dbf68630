"""The sections of the page; one that has nothing to say returns nothing and is left out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from attnopt.reporting import pictures
from attnopt.reporting.markup import Markup, joined, tag

Report = Mapping[str, Any]
_MOST: Final = 60


def _quality(report: Report) -> list[Markup]:
    """Show what was lost, with its confidence interval and the limit."""
    judged, shown = report["quality"], report.get("shown")
    if judged is None or shown is None:
        return []
    drop = judged["drop"]
    low, high = drop["ci95"]
    ends = (drop["mean"], low, high)
    drawn = []
    if all(isinstance(x, int | float) and math.isfinite(x) for x in ends):
        said = f"{judged['drop_is']}: mean, 95 % confidence interval and limit"
        drawn.append(_figure(pictures.interval(*ends, judged["max_drop"]), said))
    table = _table(("", "before", "after", "change"), shown["table"], numbers={1, 2, 3})
    return [*drawn, table, *_benchmarks(judged)]


def _benchmarks(judged: Report) -> list[Markup]:
    rows = [
        (task, metric, f"{before:.4f}", f"{after:.4f}")
        for task, metrics in judged["benchmarks"].items()
        for metric, (before, after) in metrics.items()
    ]
    return [_table(("task", "metric", "before", "after"), rows, numbers={2, 3})] if rows else []


def _costs(report: Report) -> list[Markup]:
    """Show what it costs, before and after."""
    rows = report.get("costs") or []
    drawn = [_cost(row) for row in rows]
    if not drawn:
        return []
    note = "Above, in grey: before. Below: after. Operations count pairs that a mask hides."
    return [tag("div", *drawn, class_="costs"), tag("p", note, class_="faint")]


def _cost(row: Report) -> Markup:
    before, after, unit = row["before"], row["after"], row["unit"]
    change = f" ({after / before - 1:+.1%})" if before else ""
    told = f"{' → '.join(_numbers(unit, before, after))}{change}"
    words = joined([tag("b", row["name"]), tag("br"), told])
    return tag("figure", words, pictures.pair(before, after, f"{row['name']}: {told}"))


def _numbers(unit: str, *values: float) -> list[str]:
    """Say several values in the one unit that suits the largest."""
    if unit == "seconds":
        return [f"{value * 1000:,.2f} ms" for value in values]
    for name, size, least in _SIZES[unit]:
        if max(values) >= least * size:
            return [f"{value / size:,.2f} {name}" for value in values]
    last = " B" if unit == "bytes" else ""
    return [f"{value:,}{last}" for value in values]


_SIZES: Final = {
    "bytes": (("GiB", 2**30, 1), ("MiB", 2**20, 1), ("KiB", 2**10, 10)),
    "": (("T", 10**12, 1), ("G", 10**9, 1), ("M", 10**6, 1)),
}


def _choices(report: Report) -> list[Markup]:
    """Show what was done at each site, why, and what it changed of the site's result."""
    changed, judged = report["changed"], report["quality"] or {}
    errors = judged.get("sites", {})
    if not changed:
        return [tag("p", "Nothing was changed but the spelling of attention.")]
    rows = [
        (
            c["site"],
            c["pass"],
            ", ".join(f"{k}={v}" for k, v in c["config"].items() if v is not None),
            _error(errors.get(c["site"])),
            c["why"],
        )
        for c in changed
    ]
    names = ("site", "pass", "settings", "error", "why")
    note = (
        "Error: squared error of the site's result relative to its square, each program running "
        "on its own activations."
    )
    kept = [s["name"] for s in (report.get("found") or {"sites": []})["sites"]]
    left = [name for name in kept if name not in {c["site"] for c in changed}]
    more = [tag("p", f"Left as they were: {_listed(left)}.")] if left else []
    return [_table(names, rows, numbers={3}, texts={2, 4}), tag("p", note, class_="faint"), *more]


def _error(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "" if value is None else str(value)


def _importance(report: Report) -> list[Markup]:
    """Show what each head adds, as calibration saw it."""
    told = report.get("importance")
    if not told:
        return []
    rows = told["sites"]
    names = {c["site"]: c["pass"] for c in report["changed"]}
    listed = [
        f"{number}: {row['site']}" + (f" ({names[row['site']]})" if row["site"] in names else "")
        for number, row in enumerate(rows)
    ]
    caption = f"Layers down, heads across; {told['is']}, as a multiple of the mean of its layer."
    return [
        tag("div", _figure(pictures.heat_map(rows), caption), class_="scroll"),
        pictures.shades(rows),
        tag("p", f"Rows: {_listed(listed)}.", class_="faint"),
    ]


def _pareto(report: Report) -> list[Markup]:
    """Show the plans that were weighed against each other."""
    points = [p for p in report["pareto"] if math.isfinite(p["cost"] + p["damage"])]
    if not points:
        return []
    caption = "Loss over the share of the budget that each plan leaves; the one taken is ringed."
    rows = [
        (p["label"], f"{p['cost']:.4g}", f"{p['damage']:.4g}", "taken" if p["chosen"] else "")
        for p in points
    ]
    names = ("plan", "share", "loss", "")
    return [_figure(pictures.front(points), caption), _table(names, rows, numbers={1, 2})]


def _samples(report: Report) -> list[Markup]:
    """Show how both go on from the same words."""
    return [
        tag(
            "div",
            tag("pre", sample["prompt"]),
            tag(
                "div",
                tag("div", tag("b", "before"), tag("pre", sample["before"])),
                tag("div", tag("b", "after"), tag("pre", sample["after"])),
                class_="sides",
            ),
            class_="sample",
        )
        for sample in report["samples"]
    ]


def _warnings(report: Report) -> list[Markup]:
    """Say what a reader has to know before believing the numbers."""
    judged = report["quality"]
    told = [] if judged is None else [str(note) for note in judged["notes"]]
    if judged is None:
        told.append("the quality was not measured")
    elif judged["max_drop"] is None:
        told.append("no limit was given: nothing was gated")
    stock = report["measured"].get("stock")
    told += [] if stock is None else [f"stock class: {stock}"]
    return [_list(told)] if told else []


def _found(report: Report) -> list[Markup]:
    """Show everything that was found, and what was not rewritten and why."""
    told = report.get("found")
    if told is None:
        return []
    sites, mlps = told["sites"], told["mlps"]
    rows = [
        (
            s["name"],
            f"{s['kind']}, {s['heads']} heads over {s['kv_heads']}, {s['head_dim']} channels",
            s["mask"],
            "yes" if s["cached"] else "no",
        )
        for s in sites
    ]
    parts = [tag("p", f"{len(sites)} attentions and {len(mlps)} MLPs.")]
    if rows:
        parts.append(_table(("attention", "heads", "mask", "cached"), rows, texts={1, 2}))
    misses = [
        f"{n['module'] or 'the model'} ({n['node']}): {n['why']}" for n in told["near_misses"]
    ]
    lost = [f"{u['module']}: {u['why']} ({u['where']})" for u in told["uncaptured"]]
    for name, lines in (
        ("Almost attention, and not one", misses),
        ("Refused, and left as it was", report["refused"]),
        ("Not captured", lost),
    ):
        parts += [tag("p", tag("b", name)), _list(lines)] if lines else []
    if not (misses or lost or report["refused"]):
        parts.append(tag("p", "Nothing was almost attention, refused or not captured."))
    return parts


SECTIONS: Final[tuple[tuple[str, Callable[[Report], list[Markup]]], ...]] = (
    ("Before you believe it", _warnings),
    ("Quality", _quality),
    ("Cost", _costs),
    ("What was done, site by site", _choices),
    ("Heads", _importance),
    ("Plans weighed", _pareto),
    ("In its own words", _samples),
    ("What was found", _found),
)


def _figure(drawn: Markup, caption: str) -> Markup:
    return tag("figure", drawn, tag("figcaption", caption))


def _list(lines: Sequence[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in _first(lines)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_first(names))


def _first(lines: Sequence[str]) -> Iterator[str]:
    """Yield the first of many lines, and say how many there are more."""
    yield from lines[:_MOST]
    if len(lines) > _MOST:
        yield f"and {len(lines) - _MOST:,} more, in report.json"


def _table(
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Any = frozenset(),
    texts: Any = frozenset(),
) -> Markup:
    """Return a table that scrolls by itself where the page is narrow."""

    def line(kind: str, values: Sequence[Any]) -> Markup:
        classes = [
            "number" if i in numbers else "text" if i in texts else None for i in range(len(values))
        ]
        cells = (tag(kind, v, class_=c) for v, c in zip(values, classes, strict=True))
        return tag("tr", *cells)

    head, body = line("th", names), [line("td", row) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")
