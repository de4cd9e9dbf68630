"""Make a table of the zoo: stored, compiled, exported, decoding, each against the stock model.

    python tests/bench/deploy.py                      # the models that have no row yet
    python tests/bench/deploy.py --part 2/4           # a quarter of them, at another time
    python tests/bench/deploy.py --only llama bert    # anew
    python tests/bench/deploy.py --failed             # anew those of which a check failed
    python tests/bench/deploy.py --merge a.json b.json
    python tests/bench/deploy.py --sample 8           # written nowhere

Every model is measured in a process of its own with a time limit; a crash ends one check of one
model, and the row says so. What is measured is written as it comes: an interrupted run goes on
where it was, and runs side by side add to one file. Exit status 1 where a check fails.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from deploy_rows import (
    CHECKS,
    Row,
    Rows,
    bad,
    line,
    merge,
    put,
    read,
    summary,
    table,
    unsettled,
)
from harness import RESULTS, machine

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "zoo"
SCRIPT: Final = ROOT / "tests" / "zoo_deploy.py"
MARK: Final = "@deploy "
SAMPLE: Final = (
    "llama", "bert", "vit", "wav2vec2", "nomic_bert", "clip_text", "resnet", "siglip_vision", "t5",
)  # fmt: skip
"""Unlike each other; a shorter sample takes the first of them."""
LIMIT: Final = 600.0
"""Seconds that the checks of one model may take."""
LEAST: Final = 5.0
"""Seconds that a process needs to be worth starting."""
RELOAD: Final = 60.0
"""Seconds that loading the directories of one model may take."""
BATCH: Final = 6
"""How many models a fresh process loads; importing takes longer than loading them all."""


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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME", help="these models, measured anew")
    which.add_argument("--sample", type=int, help="a fixed sample of so many models")
    which.add_argument("--part", metavar="I/N", help="every Nth model, from the Ith on")
    which.add_argument("--failed", action="store_true", help="anew the models of which one failed")
    which.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="rows of other files")
    parser.add_argument("--again", action="store_true", help="measure anew what has a row, too")
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument("--inner", default="eager", help="what compiles the rewritten graphs")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model")
    return parser.parse_args(arguments)


def part(told: str, order: Sequence[str]) -> list[str]:
    """Return every Nth model; neighbours in the zoo are alike, and go to different parts."""
    first, _, count = told.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise SystemExit(f"--part {told}: say 1/4, 2/4, 3/4 or 4/4 for quarters")
    return list(order[int(first) - 1 :: int(count)])


def wanted(given: argparse.Namespace, order: Sequence[str], rows: Rows) -> list[str]:
    """Return the models that the table is asked for."""
    if given.sample is not None and not 1 <= given.sample <= len(SAMPLE):
        raise SystemExit(f"--sample {given.sample}: it is 1 to {len(SAMPLE)}")
    unknown = sorted(set(given.only or ()) - set(order))
    if unknown:
        raise SystemExit(f"the zoo has no {', '.join(unknown)}")
    if given.failed:
        return [name for name in order if name in rows and bad(rows[name])]
    if given.part:
        return part(given.part, order)
    return list(given.only or SAMPLE[: given.sample or 0] or order)


def run_facts() -> Row:
    """Say where, when, by what and of which state of the project a run measures."""
    packages = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")
    versions: Row = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    told = subprocess.run(git, capture_output=True, text=True, check=False)
    return {**machine(), **versions, "commit": told.stdout.strip() or "not a clone"}


def main(arguments: Sequence[str]) -> int:
    given = options(arguments)
    if not SHARED.is_dir():
        print("skipped: ../shared absent")
        return 0
    checks = loaded_checks()
    order = list(checks.zoo.ZOO)
    place = given.out or (None if given.sample else RESULTS / "deploy.json")
    if given.merge:
        rows = merge(place, given.merge, order)
        names = [name for name in order if name in rows]
    else:
        rows = read(place)
        names = wanted(given, order, rows)
        anew = given.again or given.only or given.failed
        todo = [name for name in names if anew or name not in rows]
        if len(todo) < len(names):
            print(f"{len(names) - len(todo)} of {len(names)} have a row already", flush=True)
        with tempfile.TemporaryDirectory() as shelf:
            bench = Bench(checks, given.inner, given.limit, Path(shelf))
            rows |= fill(bench, todo, order, place)
    made = [rows[name] for name in order if name in names]
    print("\n".join(["", *table(made), "", *summary(made)]))
    return int(any(bad(row) for row in made))


def fill(bench: Bench, todo: Sequence[str], order: Sequence[str], place: Path | None) -> Rows:
    """Measure models, and write every row as it comes."""
    run = run_facts()
    rows: Rows = {}
    saved: list[Row] = []
    # Language models take the longest.
    for number, name in enumerate(sorted(todo, key=lambda n: n in bench.checks.zoo.LM), 1):
        rows[name] = bench.measure(name)
        saved.append(rows[name])
        if len(saved) == BATCH or number == len(todo):
            bench.reload(saved)
            saved = []
        print(line(rows[name], number, len(todo)), flush=True)
        if place is not None:
            put(place, rows, run, order)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
