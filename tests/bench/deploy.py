"""Make a table of the zoo: stored, compiled, exported, decoding, each against the stock model.

    python tests/bench/deploy.py
    python tests/bench/deploy.py --only llama bert
    python tests/bench/deploy.py --sample 8

Every model is measured in a process of its own with a time limit; a crash ends one check of one
model. What is measured is written as it comes: an interrupted run goes on where it was, and
`--only` replaces the rows that it names. Exit status 1 where a check fails.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness import RESULTS, machine

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "zoo"
SCRIPT: Final = ROOT / "tests" / "zoo_deploy.py"
MARK: Final = "@deploy "
CHECKS: Final = (
    "stored",
    "compiled",
    "onnx",
    "tokens_lowered",
    "tokens_compiled",
    "tokens_onnx",
    "mutants",
)
SAMPLE: Final = (
    "llama", "bert", "vit", "wav2vec2", "nomic_bert", "clip_text", "resnet", "siglip_vision", "t5",
)  # fmt: skip
"""Unlike each other; a shorter sample takes the first of them."""
LIMIT: Final = 240.0
"""Seconds that the checks of one model may take."""
LEAST: Final = 5.0
"""Seconds that a process needs to be worth starting."""
RELOAD: Final = 60.0
"""Seconds that loading the directories of one model may take."""
IN_PARTS: Final = ("module by module",)
"""Words of the reason for which models captured in pieces are not exported."""

BATCH: Final = 6
"""How many models a fresh process loads; importing takes longer than loading them all."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What measures models: a module that this process has imported, for processes forked of it."""

    checks: Any
    inner: str
    limit: float
    shelf: Path

    def measure(self, name: str) -> Row:
        """Fill in a row; where a process dies, the checks that are left run in another."""
        start = time.monotonic()
        found: dict[str, Row] = {}
        while left := [check for check in CHECKS if check not in found]:
            remaining = self.limit - (time.monotonic() - start)
            if remaining < LEAST:
                found |= {check: _failed("no time was left") for check in left}
                break
            found |= self._checked(name, left, remaining)
        ordered = {check: found[check] for check in CHECKS}
        return {"model": name, "checks": ordered, "seconds": round(time.monotonic() - start, 1)}

    def _checked(self, name: str, checks: Sequence[str], limit: float) -> dict[str, Row]:
        """Run checks in a process; the one that it died of is failed, those after it are absent."""
        work = lambda: self.checks.check(name, checks, self.inner, self.shelf)  # noqa: E731
        lines, ended = _in_a_process(lambda out, err: _forked(work, out, err), limit)
        found = {x.pop("check"): x for x in lines if "check" in x}
        if ended:
            at = next((x["started"] for x in lines[::-1] if "started" in x), checks[0])
            found.setdefault(at, _failed(ended))
        return found or {check: _failed("its process said nothing") for check in checks}

    def reload(self, rows: Sequence[Row]) -> None:
        """Load in a fresh process what the rows' models saved, and put into them what came out."""
        left = {row["model"]: row["checks"]["stored"] for row in rows if unsettled(row)}
        while left:
            lines, ended = _in_a_process(
                lambda out, err: _fresh([str(self.shelf), *left], out, err), RELOAD * len(left)
            )
            for found in [x for x in lines if "name" in x]:
                left.pop(found.pop("name")).update(found)
            if ended:
                at = next((x["started"] for x in lines[::-1] if "started" in x), next(iter(left)))
                left.pop(at, {}).update(status="failed", reason=f"while loading: {ended}")
        for row in rows:
            shutil.rmtree(self.shelf / row["model"], ignore_errors=True)


def unsettled(row: Row) -> bool:
    """Tell whether what a model saved has not been loaded yet."""
    stored = row["checks"]["stored"]
    return stored["status"] == "passed" and "loaded" not in stored


def _in_a_process(begin: Callable[[Any, Any], int], limit: float) -> tuple[list[Row], str]:
    """Run a process with those that it starts; return the lines of its results, and how it died."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ended = _waited(begin(out, err), limit)
        out.seek(0)
        err.seek(0)
        lines = [json.loads(x.removeprefix(MARK)) for x in out if x.startswith(MARK)]
        said = err.read().strip().splitlines()
    return lines, f"{ended} ({said[-1][:200]})" if ended and said else ended


def _forked(work: Callable[[], None], out: Any, err: Any) -> int:
    """Do something in a copy of this process, in a process group of its own."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _fresh(arguments: Sequence[str], out: Any, err: Any) -> int:
    """Start a new interpreter, the zoo of ../shared first on its path."""
    paths = (str(SHARED), str(SCRIPT.parent), os.environ.get("PYTHONPATH", ""))
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.Popen(words, stdout=out, stderr=err, start_new_session=True, env=own).pid


def _waited(process: int, limit: float) -> str:
    """Wait for a process, end its group at the limit, and say how it died."""
    end, state = time.monotonic() + limit, (0, 0)
    try:
        while not state[0] and time.monotonic() < end:
            state = os.waitpid(process, os.WNOHANG)
            time.sleep(0.02)
    finally:
        if not state[0]:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
    if not state[0]:
        return f"took more than {limit:.0f} s"
    status = os.waitstatus_to_exitcode(state[1])
    return "" if status == 0 else f"its process ended with status {status}"


def _failed(why: str) -> Row:
    return {"status": "failed", "reason": why, "seconds": 0.0}


# ------------------------------------------------------------------------------------- the file


def read(place: Path) -> list[Row]:
    """Read the rows of a file; those whose directories were never loaded are no results."""
    rows: list[Row] = json.loads(place.read_text())["rows"] if place.is_file() else []
    return [row for row in rows if not unsettled(row)]


def write(place: Path, rows: Iterable[Row], *, complete: bool) -> None:
    """Write all rows, in the order of the zoo, in one step."""
    place.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "complete": complete, "rows": list(rows)}
    staged = place.with_name(f"{place.name}.new")
    staged.write_text(json.dumps(content, indent=1) + "\n")
    staged.replace(place)


def interrupted(place: Path) -> list[Row]:
    """Return the rows of a run that was interrupted; none where the file is complete."""
    if not place.is_file() or json.loads(place.read_text()).get("complete", True):
        return []
    return read(place)


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
        return {"failed": "**failed**", "refused": "refused", "n/a": ""}[found["status"]]
    if name == "stored":
        return f"equal, tier {found['tier']}"
    if name == "compiled":
        return f"{found['found']} of {found['sites']}, {found['rms_ratio']:.2f}x"
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
        refused = f" ({states.count('refused')} refused)" if "refused" in states else ""
        parts.append(f"{check} {states.count('passed')} of {asked}{refused}")
    yield f"{len(rows)} models: {'; '.join(parts)}"
    for row in rows:
        for check, found in row["checks"].items():
            if found["status"] in ("failed", "refused"):
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
    """List the checks that count as failed; a model of two graphs may be refused by ONNX."""
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


# ---------------------------------------------------------------------------------------- start


def loaded_checks() -> Any:
    """Import the checks with the zoo of ../shared; the processes of all models are copies of it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[1:1] = [str(SHARED), str(SCRIPT.parent)]
    checks = importlib.import_module(SCRIPT.stem)
    checks.prepare()
    checks.warm()
    # What is imported by now is never collected, and no process lives long enough to need it.
    gc.freeze()
    gc.disable()
    return checks


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models")
    parser.add_argument("--sample", type=int, help="a fixed sample of so many models")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--inner", default="eager", help="what compiles the rewritten graphs")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    given = options(arguments)
    if not SHARED.is_dir():
        print("skipped: ../shared absent")
        return 0
    if given.sample is not None and not 1 <= given.sample <= len(SAMPLE):
        raise SystemExit(f"--sample {given.sample}: it is 1 to {len(SAMPLE)}")
    checks = loaded_checks()
    order = list(checks.zoo.ZOO)
    wanted = given.only or (SAMPLE[: given.sample] if given.sample else order)
    unknown = sorted(set(wanted) - set(order))
    if unknown:
        raise SystemExit(f"the zoo has no {', '.join(unknown)}")
    place = given.out or (None if given.sample else RESULTS / "deploy.json")
    rows = {row["model"]: row for row in _kept(place, whole=wanted is order)}
    with tempfile.TemporaryDirectory() as shelf:
        bench = Bench(checks, given.inner, given.limit, Path(shelf))
        fill(bench, rows, wanted, order, place)
    made = [rows[name] for name in order if name in wanted]
    print("\n".join(["", *table(made), "", *summary(made)]))
    return int(any(bad(row) for row in made))


def fill(
    bench: Bench,
    rows: dict[str, Row],
    wanted: Sequence[str],
    order: Sequence[str],
    place: Path | None,
) -> None:
    """Measure the models that are wanted; of the whole zoo, those that have no row yet."""
    whole = wanted is order
    todo = [name for name in wanted if not (whole and name in rows)]
    # Language models take the longest.
    todo.sort(key=lambda name: name in bench.checks.zoo.LM)
    if len(todo) < len(wanted):
        print(f"{len(rows)} models were measured before an interruption", flush=True)
    saved: list[Row] = []
    for number, name in enumerate(todo, 1):
        rows[name] = bench.measure(name)
        saved.append(rows[name])
        if len(saved) == BATCH or number == len(todo):
            bench.reload(saved)
            saved = []
        print(line(rows[name], number, len(todo)), flush=True)
        if place is not None:
            complete = set(rows) >= set(order) and (number == len(todo) or not whole)
            write(place, [rows[n] for n in order if n in rows], complete=complete)


def _kept(place: Path | None, *, whole: bool) -> list[Row]:
    """Return the rows of a file that this run leaves as they are."""
    if place is None:
        return []
    return interrupted(place) if whole else read(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
