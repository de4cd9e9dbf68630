"""report.json: what was found, changed and measured, under a versioned schema.

`report.schema.json` beside this file describes it. Two entries are there only where somebody made
them. `pareto` is a list of {"cost", "damage", "chosen", "label"}: the share of the budget that a
plan leaves, what it loses in nats a token, and whether it is the plan that was taken; it comes from
the search that a plan has behind it, or as `pareto` in what was measured.
`latency` in what was measured maps what was timed to its seconds before and after.
"""

import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from attnopt.costs import count_costs, default_workload
from attnopt.moments import Statistics
from attnopt.nouns import Mlp, Site
from attnopt.ops import attention, neighborhood_attention
from attnopt.ops.variants import fast_copies
from attnopt.program import Program
from attnopt.weights import described

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result

SCHEMA: Final = "attnopt.report/1"
IMPORTANCE: Final = "mean absolute amount that a head adds to the outputs of its layer"


def schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json."""
    text = files("attnopt.reporting").joinpath("report.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def content_of(result: "Result", sizes: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return what was measured, as JSON values; `sizes` are the bytes of weights before and after.

    What was found is told of a result that was judged, or rewritten by a plan.
    """
    measured = dict(result.measured or {})
    samples, estimate = measured.pop("samples", []), measured.pop("estimate", None)
    search = result.plan.search
    pareto = measured.pop("pareto", None) or (() if search is None else search.points)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "accepted": result.accepted,
        "model": result.program.name,
        "goal": dict(result.plan.goal),
        "quality": None if result.report is None else result.report.content(),
        "measured": measured,
        "changed": [
            {"site": c.site, "pass": c.rewrite, "config": dict(c.config), "why": c.why}
            for c in result.plan.choices
        ],
        "refused": [str(no) for no in result.program.refused],
        "samples": list(samples),
        "pareto": [_point(point) for point in pareto or ()],
    }
    if result.report is None and not result.plan.choices:
        return content
    if result.report is not None:
        table = [list(row) for row in result.report.scores.rows()]
        content["shown"] = {"table": table, "verdict": result.report.verdict}
    content["estimate"] = estimate
    content["found"] = _found(result.reference)
    content["importance"] = _importance(result)
    content["costs"] = list(_costs(result, measured, sizes))
    return content


def _point(point: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cost": float(point["cost"]),
        "damage": float(point["damage"]),
        "chosen": bool(point.get("chosen", False)),
        "label": str(point.get("label", "")),
    }


def _single(program: Program) -> Program:
    """Return the graph that runs every site, or the program itself where it is of many parts."""
    return program if set(program.parts) - {"encode", "decode"} else program.main


def _found(program: Program) -> dict[str, Any]:
    """Return every attention and MLP, what almost was one, and what could not be captured."""
    looked = _single(program)
    return {
        "sites": [_site(site) for site in looked.sites],
        "mlps": [{"name": m.name, "neurons": m.neurons} for m in looked.mlps],
        "near_misses": [
            {"module": n.module, "node": n.node, "why": n.why} for n in looked.near_misses
        ],
        "uncaptured": [
            {"module": u.module, "why": u.why, "where": u.where} for u in program.uncaptured
        ],
    }


def _site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "mask": str(site.mask),
        "cached": site.cached,
    }


def _importance(result: "Result") -> dict[str, Any] | None:
    """Return what calibration says of each head; None where there was none, or of no head."""
    stats = _statistics(result)
    if stats is None:
        return None
    found: list[dict[str, Any]] = [
        {"site": site.name, "scores": [float(x) for x in stats.contribution(parameter)]}
        for site in _single(result.reference).sites
        for parameter in _read(site)
        if f"contribution.{parameter}" in stats.tensors
    ]
    finite = [row for row in found if all(math.isfinite(x) for x in row["scores"])]
    return {"is": IMPORTANCE, "sites": finite} if finite else None


def _statistics(result: "Result") -> Statistics | None:
    plan = result.plan
    if plan.statistics is None and plan.source is not None:
        return Statistics.load(plan.source, result.reference.weights)
    found: Statistics | None = plan.statistics
    return found


def _read(thing: Site | Mlp) -> Iterator[str]:
    """Yield the parameter that reads the heads, where it is known."""
    output = thing.projections.get("o")
    if output is not None:
        yield output.parameter


def _costs(
    result: "Result", measured: Mapping[str, Any], sizes: tuple[int, int] | None
) -> Iterator[dict[str, Any]]:
    """Yield what the program costs, before and after."""
    both = (result.reference, result.program)
    yield _cost("parameters", "", *map(_parameters, both))
    if not any(map(_uncounted, both)):
        workload = default_workload(result.reference)
        counted = (count_costs(p, workload).flops for p in both)
        yield _cost(f"operations, {workload}", "", *counted)
    for key, name in _BYTES.items():
        if key in measured:
            yield _cost(name, "bytes", *measured[key])
    if sizes is not None:
        yield _cost("weight files", "bytes", *sizes)
    for name, pair in dict(measured.get("latency") or {}).items():
        yield _cost(str(name), "seconds", *pair)


_BYTES: Final = {"kv_bytes_per_token": "cache a token", "ring_bytes": "windows a row"}


def _cost(name: str, unit: str, before: float, after: float) -> dict[str, Any]:
    return {"name": name, "unit": unit, "before": before, "after": after}


def _parameters(program: Program) -> int:
    looked = _single(program)
    parts = looked.parts.values() or (looked,)
    names = {b.name for p in parts for b in p.bindings.values() if b.kind == "parameter"}
    return sum(math.prod(described(program.weights, name).shape) for name in names)


def _uncounted(program: Program) -> bool:
    """Tell whether attention is computed by an op whose operations depend on its data."""
    counted = {attention, neighborhood_attention}
    parts = (program.growing, *(p.growing for p in program.parts.values()))
    return any(
        node.target in fast_copies() and node.target not in counted
        for part in parts
        for node in part.graph.nodes
    )
