"""A site as text and as JSON: every fact of it, in full or in the few words of a table."""

import re
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from attnopt.nouns import Grid, Projection, Rope, Site

_INDEX_MARK = "*"


@dataclass(frozen=True)
class Group:
    """Sites that differ by their layer only, such as `model.layers.*.self_attn`."""

    pattern: str
    layers: tuple[int, ...]
    sites: tuple[Site, ...]


def as_json(site: Site) -> dict[str, Any]:
    """Return every fact; the rows of a head are slices such as "0:64" or "0:32,64:96:2"."""
    facts = asdict(replace(site, projections={}))
    facts["projections"] = {
        role: {**asdict(p), "rows": [slices(rows) for rows in p.rows]}
        for role, p in site.projections.items()
    }
    return facts


def slices(rows: tuple[int, ...]) -> str:
    """Write a list of indices as slices."""
    return ",".join(_slice(run) for run in _runs(rows))


def _slice(run: list[int]) -> str:
    start, stop, step = run
    return f"{start}:{stop}" if step == 1 else f"{start}:{stop}:{step}"


def _runs(rows: tuple[int, ...]) -> list[list[int]]:
    """Compress a list of indices to runs [start, stop, step]."""
    found: list[list[int]] = []
    for row in rows:
        if found and _continues(found[-1], row):
            start = found[-1][0]
            step = row - start if found[-1][1] == start + 1 else found[-1][2]
            found[-1] = [start, row + 1, step]
        else:
            found.append([row, row + 1, 1])
    return found


def _continues(run: list[int], row: int) -> bool:
    start, stop, step = run
    return row >= stop if stop == start + 1 else row == stop - 1 + step


def groups(sites: tuple[Site, ...]) -> tuple[Group, ...]:
    """Collect the sites that are equal but for one number in their module's path."""
    found: dict[Any, list[tuple[int, Site]]] = {}
    for site in sites:
        pattern, layer = _pattern(site)
        found.setdefault((pattern, _facts_without_names(site)), []).append((layer, site))
    return tuple(
        Group(key[0], tuple(n for n, _ in members), tuple(s for _, s in members))
        for key, members in found.items()
    )


def _pattern(site: Site) -> tuple[str, int]:
    """Replace the first number of a path, which is the layer, by a star."""
    parts = site.name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:place], _INDEX_MARK, *parts[place + 1 :]]), int(part)
    return site.name, -1


def _facts_without_names(site: Site) -> str:
    return repr(replace(site, name="", module="", projections={}))


def layers(numbers: tuple[int, ...]) -> str:
    """Write layer numbers as ranges: 0-27, or 0-4,6-10, or 0-46:2 for every second one."""
    if numbers == (-1,):
        return ""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}-{numbers[-1]}:{steps.pop()}"
    enumerated = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in members] for _, members in enumerated]
    return ",".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def folded(name: str, width: int) -> str:
    """Break a dotted name into lines after its dots."""
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def sharing(site: Site) -> str:
    """Name how query heads share key heads."""
    ratios = {site.heads: "MHA", 1: "MQA"} if site.heads > 1 else {1: "MHA"}
    named = ratios.get(site.kv_heads, "GQA")
    return named if site.kind == "self" else f"{site.kind} {named}"


def heads(site: Site) -> str:
    """Write the query heads, and the key heads where they are fewer."""
    same = site.heads == site.kv_heads
    return str(site.heads) if same else f"{site.heads}/{site.kv_heads}"


def dims(site: Site) -> str:
    """Write the channels of a head; those of values apart where they differ."""
    same = site.head_dim == site.v_head_dim
    return str(site.head_dim) if same else f"{site.head_dim}/{site.v_head_dim}"


def mask(site: Site) -> str:
    """Write the mask with its sizes, and whether padding joins it."""
    m = site.mask
    sizes = [f"{n:,}" for n in (m.window, m.right, m.prefix) if n is not None]
    return " ".join([m.kind, "/".join(sizes)]).strip() + ("+pad" if site.padded else "")


def rope(value: Rope | None, head_dim: int) -> str:
    """Write the rotary embedding, and its channels where it leaves some alone."""
    if value is None:
        return "-"
    return value.style if value.channels == head_dim else f"{value.style} {value.channels}"


def grid(value: Grid) -> str:
    """Write the image that the tokens come from."""
    leading = f"+{value.leading}" if value.leading else ""
    return f"{value.height}x{value.width}{leading}"


def extras(site: Site) -> str:
    """Write what most sites do not have."""
    default = site.head_dim**-0.5
    unusual = site.scale is not None and abs(site.scale - default) > 1e-4 * default
    listed = (
        f"scale {site.scale:.4g}" if unusual else "",
        f"bias {site.bias}" if site.bias != "none" else "",
        f"cap {site.softcap:g}" if site.softcap is not None else "",
        "sinks" if site.sinks else "",
        f"{site.qk_norm} qk-norm" if site.qk_norm else "",
        f"grid {grid(site.grid)}" if site.grid else "",
        "rotary after cache" if site.rope and site.rope.placement == "after_cache" else "",
    )
    return ", ".join(item for item in listed if item)


def sentences(site: Site) -> list[tuple[str, str]]:
    """Return every fact as a name and a few words."""
    return [
        ("module", site.module or "(the model itself)"),
        ("kind", f"{site.kind}, {sharing(site).removeprefix('cross ')}"),
        ("heads", f"{site.heads} query, {site.kv_heads} key and value"),
        ("channels", f"{site.head_dim} query and key, {site.v_head_dim} value"),
        ("scale", "none" if site.scale is None else f"{site.scale:.6g}"),
        ("mask", str(site.mask)),
        ("padding", _yes(site.padded)),
        ("bias", site.bias),
        ("soft cap", "none" if site.softcap is None else f"{site.softcap:g}"),
        ("sinks", _yes(site.sinks)),
        ("rotary", "none" if site.rope is None else _rope_sentence(site.rope)),
        ("q/k norm", site.qk_norm or "none"),
        ("cached", _yes(site.cached)),
        ("grid", grid(site.grid) if site.grid else "none"),
        *((role, _projection_sentence(p)) for role, p in site.projections.items()),
        *(("note", note) for note in site.notes),
    ]


def _rope_sentence(value: Rope) -> str:
    return f"{value.style}, {value.channels} channels, {value.placement.replace('_', ' ')}"


def _projection_sentence(projection: Projection) -> str:
    axis = ("rows", "columns")[projection.axis] if projection.axis < 2 else "slices"
    bias = f", bias {projection.bias}" if projection.bias else ""
    first = slices(projection.rows[0])
    shown = first if len(first) <= 40 else f"{first[:40]}..."
    return f"{projection.parameter} ({projection.layout}), head 0 = {axis} {shown}{bias}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
