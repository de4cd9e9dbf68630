"""The rows of the deployment table: one file that runs add to, and what is told of it.

Every row knows the run that measured it: its command, machine, versions and commit. Runs side by
side may write to one file, and files may be merged.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

CHECKS: Final = (
    "stored",
    "compiled",
    "onnx",
    "tokens_lowered",
    "tokens_compiled",
    "tokens_onnx",
    "mutants",
)
SHOWN: Final = {"failed": "**failed**", "refused": "refused", "limit": "torch cannot", "n/a": ""}
IN_PARTS: Final = ("module by module",)
"""Words of the reason for which models captured in pieces are not exported."""

Row = dict[str, Any]
Rows = dict[str, Row]


def unsettled(row: Row) -> bool:
    """Tell whether what a model saved has not been loaded yet."""
    stored = row["checks"]["stored"]
    return stored["status"] == "passed" and "loaded" not in stored


def read(place: Path | None) -> Rows:
    """Read the rows of a file; those whose directories were never loaded are no results."""
    _, rows = _content(place)
    return {name: row for name, row in rows.items() if not unsettled(row)}


def put(place: Path, made: Rows, run: Mapping[str, Any], order: Sequence[str]) -> None:
    """Put what a run measured among the rows of a file, in the order of the zoo, in one step."""
    with _alone(place):
        runs, rows = _content(place)
        _put(place, [*runs, dict(run)], {**rows, **_of_run(made, len(runs))}, order)


def merge(place: Path, others: Sequence[Path], order: Sequence[str]) -> Rows:
    """Put the rows of other files among those of a file, the last of a model; return them all."""
    with _alone(place):
        runs, rows = _content(place)
        for other in others:
            more, found = _content(other)
            settled = {n: row for n, row in found.items() if not unsettled(row)}
            moved = {n: {**r, "run": len(runs) + r["run"]} for n, r in settled.items()}
            runs, rows = [*runs, *more], {**rows, **moved}
        _put(place, runs, rows, order)
    return read(place)


def _of_run(made: Rows, run: int) -> Rows:
    return {name: {**row, "run": run} for name, row in made.items()}


def _content(place: Path | None) -> tuple[list[Row], Rows]:
    if place is None or not place.is_file():
        return [], {}
    content = json.loads(place.read_text())
    return content["runs"], {row["model"]: row for row in content["rows"]}


def _put(place: Path, runs: Sequence[Row], rows: Rows, order: Sequence[str]) -> None:
    """Write rows with the runs that measured any of them, each run once."""
    kept: list[Row] = []
    numbered: list[Row] = []
    for name in [n for n in order if n in rows]:
        run = runs[rows[name]["run"]]
        if run not in kept:
            kept.append(run)
        numbered.append({**rows[name], "run": kept.index(run)})
    content = {"runs": kept, "complete": set(rows) >= set(order), "rows": numbered}
    staged = place.with_name(f"{place.name}.new")
    staged.write_text(json.dumps(content, indent=1) + "\n")
    staged.replace(place)


@contextlib.contextmanager
def _alone(place: Path) -> Generator[None]:
    """Keep other runs from the files of a folder for a moment."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------ the table


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield f"| model | {' | '.join(check.replace('_', ' ') for check in CHECKS)} | s |"
    yield f"|---|{'---|' * (len(CHECKS) + 1)}"
    for row in rows:
        cells = [cell(check, row["checks"][check]) for check in CHECKS]
        yield f"| {row['model']} | {' | '.join(cells)} | {row['seconds']:.0f} |"


def cell(name: str, found: Row) -> str:
    """Say in a few words how a check came out."""
    if found["status"] != "passed":
        return SHOWN[found["status"]]
    if name == "stored":
        return f"equal, tier {found['tier']}"
    if name == "compiled":
        way = f", {found['way']}" if found.get("way") else ""
        return f"{found['found']} of {found['sites']}, {found['rms_ratio']:.2f}x{way}"
    if name == "onnx":
        return f"{max(found['exporter'], found['here']):.0e}"
    if name == "mutants":
        return f"{len(found['caught'])} noticed"
    return f"{found['equal']} of {found['of']} ({found['distinct']})"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what passed of how many, and the reasons of everything else."""
    parts = []
    for check in CHECKS:
        states = [row["checks"][check]["status"] for row in rows]
        asked = len(states) - states.count("n/a")
        others = [
            f"{states.count(state)} {told}"
            for state, told in (("refused", "refused"), ("limit", "torch cannot"))
            if state in states
        ]
        told = f" ({', '.join(others)})" if others else ""
        parts.append(f"{check} {states.count('passed')} of {asked}{told}")
    yield f"{len(rows)} models: {'; '.join(parts)}"
    for row in rows:
        for check, found in row["checks"].items():
            if found["status"] in ("failed", "refused", "limit"):
                yield f"  {row['model']} {check} {found['status']}: {found['reason']}"
    yield from _about_tokens(rows)


def _about_tokens(rows: Sequence[Row]) -> Iterator[str]:
    """Say which texts prove little, and how often a mutant writes the text of the stock model."""
    counts = {
        row["model"]: found["distinct"]
        for row in rows
        if "distinct" in (found := row["checks"]["tokens_lowered"])
    }
    few = [f"{name} ({count})" for name, count in counts.items() if count < 4]
    yield f"texts of fewer than 4 different tokens: {', '.join(few) or 'none'}"
    made = [by for row in rows for by in row["checks"]["mutants"].get("caught", {}).values()]
    texts = [by["tokens"] for by in made if "tokens" in by]
    yield f"mutants that write another text: {sum(texts)} of {len(texts)}"


def bad(row: Row) -> list[str]:
    """List the checks that count as failed: neither limits of torch nor models in parts do."""
    return [
        check
        for check, found in row["checks"].items()
        if found["status"] == "failed"
        or (found["status"] == "refused" and not any(w in found["reason"] for w in IN_PARTS))
    ]


def line(row: Row, number: int, count: int) -> str:
    """Say how one model came out."""
    short = [f"{check}: {row['checks'][check]['status']}" for check in CHECKS]
    shown = [text for text in short if not text.endswith((": passed", ": n/a"))]
    verdict = "; ".join(shown) or "all passed"
    return f"{number:3} of {count} {row['model']:28} {row['seconds']:6.1f} s  {verdict}"
