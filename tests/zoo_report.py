"""Print one table over the whole zoo: what is captured, found, rewritten, and how exactly.

python tests/zoo_report.py
python tests/zoo_report.py --only llama t5 --attention eager --task lm --json
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import zoo
import zoo_facts
import zoo_parity
from site_facts import all_mismatches

import attnopt

COLUMNS = (
    f"{'entry':28} {'attn':5} {'task':4} {'capture':8} {'sites':7} {'facts':5} {'exact':7} "
    f"{'RMS':>6} {'max':>6} {'mutants':7} {'s':>5}"
)


@dataclass(frozen=True)
class Row:
    """One entry in one spelling and task."""

    entry: str
    attention: str
    task: str
    capture: str = "-"
    found: int = 0
    declared: int = 0
    facts: tuple[str, ...] = ()
    rewritten: int = 0
    refused: tuple[str, ...] = ()
    rms_ratio: float = float("nan")
    max_ratio: float = float("nan")
    exact: bool = False
    captured_exactly: bool = False
    mutants: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def good(self) -> bool:
        caught = all(self.mutants.values())
        counted = self.found == self.declared and self.rewritten == self.found
        return not self.error and counted and not self.facts and self.exact and caught

    def line(self) -> str:
        sites, exact = f"{self.found}/{self.declared}", f"{self.rewritten}/{self.found}"
        mutants = f"{sum(self.mutants.values())}/{len(self.mutants)}"
        facts = "ok" if not self.facts else str(len(self.facts))
        mark = "" if self.good else " *"
        return (
            f"{self.entry:28} {self.attention:5} {self.task:4} {self.capture:8} {sites:7} "
            f"{facts:5} {exact:7} {self.rms_ratio:6.3g} {self.max_ratio:6.3g} {mutants:7} "
            f"{self.seconds:5.1f}{mark}"
        )

    def details(self) -> Iterator[str]:
        if self.error:
            yield f"    error: {self.error}"
        yield from (f"    fact: {fact}" for fact in self.facts)
        yield from (f"    refused: {why}" for why in self.refused)
        if not self.captured_exactly and self.rms_ratio == self.rms_ratio:
            yield "    the captured program, before any rewrite, already differs"


def measure(entry: str, attention: str, task: str, *, mutants: bool = True) -> Row:
    """Fill in one row; an error ends it and is recorded as its text."""
    start = time.monotonic()
    row = Row(entry, attention, task, declared=zoo.ZOO[entry].sites)
    try:
        for reached in _stages(row, mutants):
            row = reached
    except Exception as error:  # whatever it is, it ends the row and not the report
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        first = (str(error).strip().splitlines() or ["no message"])[0]
        row = replace(row, error=f"{type(error).__name__}: {first[:200]} ({where})")
    return replace(row, seconds=time.monotonic() - start)


def _stages(row: Row, mutants: bool) -> Iterator[Row]:
    subject = zoo_parity.subject(row.entry, row.attention, row.task)
    if mutants:
        caught = {n: not v.passed for n, v in zoo_parity.mutant_verdicts(subject)}
        row = replace(row, mutants=caught)
        yield row
    program = attnopt.capture(subject.model, (), subject.kwargs)
    row = replace(row, capture=captured_as(program))
    yield row
    expected = zoo_facts.expected(row.entry, subject.model.config, subject.kwargs, row.task)
    facts = all_mismatches(program.sites, expected)
    row = replace(row, found=len(program.sites), facts=facts)
    yield row
    exact = attnopt.apply(program, "exact")
    refused = tuple(str(no) for no in exact.refused)
    row = replace(row, refused=refused, rewritten=rewritten_sites(program, exact))
    yield row
    verdicts = zoo_parity.parity(subject, {"captured": program, "exact": exact})
    yield replace(
        row,
        rms_ratio=verdicts["exact"].rms_ratio,
        max_ratio=verdicts["exact"].peak_ratio,
        exact=verdicts["exact"].passed,
        captured_exactly=verdicts["captured"].passed,
    )


def captured_as(program: Any) -> str:
    if program.uncaptured:
        return "parts"
    return "whole" if not program.parts else "+".join(program.parts)[:8]


def rewritten_sites(program: Any, exact: Any) -> int:
    """Count the sites that the exact program no longer refuses."""
    before = {str(no) for no in program.refused}
    declined = [no for no in exact.refused if str(no) not in before]
    return max(len(program.sites) - len(declined), 0)


Case = tuple[str, str, str]


def cases(options: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """List what there is to measure, and what Transformers does not have."""
    asked = [
        (entry, attention, task)
        for entry in options.only or zoo.ZOO
        for attention in options.attention
        for task in options.task
        if task == "base" or entry in zoo.LM
    ]
    return [c for c in asked if zoo.offers(*c)], [c for c in asked if not zoo.offers(*c)]


def skipped(missing: Sequence[Case]) -> str:
    """Say in one line which entries have no such attention."""
    names = dict.fromkeys(f"{entry} {attention}" for entry, attention, _ in missing)
    return f"no such attention in Transformers, skipped: {', '.join(names) or 'none'}"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    sites = sum(row.declared for row in rows)
    found = sum(min(row.found, row.declared) for row in rows)
    yield f"{len(rows)} rows, {sum(row.good for row in rows)} good"
    yield f"captured whole: {sum(row.capture not in ('-', 'parts') for row in rows)}"
    yield f"sites found: {found} of {sites}; too many: {sum(_extra(row) for row in rows)}"
    yield f"sites rewritten: {sum(row.rewritten for row in rows)}"
    yield f"rows whose facts all agree: {sum(not row.facts and not row.error for row in rows)}"
    yield f"rows within 1.25x RMS and 2x max of the stock error: {sum(row.exact for row in rows)}"
    missed = [f"{row.entry} {n}" for row in rows for n, caught in row.mutants.items() if not caught]
    yield f"mutants that the comparison missed: {', '.join(missed) or 'none'}"


def _extra(row: Row) -> int:
    return max(row.found - row.declared, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="entries")
    parser.add_argument("--attention", nargs="*", default=["eager", "sdpa"])
    parser.add_argument("--task", nargs="*", default=["base", "lm"])
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not options.json:
        print(COLUMNS, flush=True)
    rows = []
    present, missing = cases(options)
    for entry, attention, task in present:
        rows.append(measure(entry, attention, task, mutants=not options.no_mutants))
        if not options.json:
            print("\n".join([rows[-1].line(), *rows[-1].details()]), flush=True)
    if options.json:
        print(json.dumps([asdict(row) | {"good": row.good} for row in rows], indent=1))
    else:
        print("\n".join([*summary(rows), skipped(missing)]))
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
