"""Time every model of the zoo compiled: backend "attnopt" beside plain inductor, on the same call.

    python tests/bench/compiled_zoo.py                    # the models that have no row yet
    python tests/bench/compiled_zoo.py --only llama bert  # anew

Each model is compiled by both backends in a process of its own, with the attention that
Transformers chooses for it and fixed sizes, compared with the stock model, and timed in interleaved
rounds; in more processes, with the backends in another order, where the ratio is close to one. The
models are tiny, so that this weighs what is done beside the arithmetic; compiled.py times larger
ones. Rows are written as they come; a model that plain inductor cannot compile neither passes nor
fails. Exit status 1 where results differ or where the interval of the speedup ends below 1.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any, Final

from harness import RESULTS, Timing, as_row, compare, machine
from processes import answer, apart, speedup, while_close

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "zoo"
PLACE: Final = RESULTS / "compiled_zoo.json"
BACKENDS: Final = ("inductor", "attnopt")
LIMIT: Final = 600
TURNS: Final = 3
TOLERANCE: Final = 1e-3
"""Of the largest value: what float32 may differ by; parity proper is the business of the tests."""

Row = dict[str, Any]


def measure(name: str, most: int, turn: int) -> Row:
    """Compile one model with both backends, compare and time them; return all rounds."""
    import torch
    import transformers
    import zoo
    import zoo_parity

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, call, _ = zoo.build(name, None)
    order = BACKENDS[:: -1 if turn % 2 else 1]
    runs = {b: torch.compile(model, backend=b, dynamic=False) for b in order}
    with torch.no_grad():
        torch.manual_seed(0)
        want = zoo_parity.compared(model(**call))
        worst = {}
        for backend, run in runs.items():
            torch.manual_seed(0)
            try:
                found = run(**call)
            except Exception as error:
                if backend != "inductor":
                    raise
                # The row says so: there is nothing to be as fast as.
                return {"limit": f"{type(error).__name__}: {error}".splitlines()[0]}
            worst[backend] = farthest(zoo_parity.compared(found), want)
        calls = {backend: lambda r=run: r(**call) for backend, run in runs.items()}
        timing = compare(calls, base="attnopt", most=most)
    return {"differs": worst, "seconds": dict(timing.seconds)}


def row_of(name: str, parts: list[Any]) -> Row:
    """Return the row of a model from what each process found."""
    for part in parts:
        if isinstance(part, str):
            return {"model": name, "passed": False, "reason": part}
        if "limit" in part:
            return {"model": name, "passed": None, "reason": part["limit"]}
    seconds = [part["seconds"] for part in parts]
    pooled = Timing({b: tuple(t for x in seconds for t in x[b]) for b in BACKENDS})
    worst = {b: max(part["differs"][b] for part in parts) for b in BACKENDS}
    gain = speedup("inductor", "attnopt", seconds)
    return {
        "model": name,
        "milliseconds": {b: round(1e3 * pooled.median(b), 4) for b in BACKENDS},
        "speedup": {"inductor": as_row(gain)},
        "rounds": len(pooled.seconds["attnopt"]),
        "processes": len(parts),
        "differs": worst,
        "passed": worst["attnopt"] <= TOLERANCE and gain.high >= 1,
    }


def farthest(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Return the largest difference as a share of the largest value."""
    return max(
        float((got[n].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-9))
        for n, x in want.items()
    )


def alone(name: str, most: int) -> Row:
    """Measure a model in a process of its own, and in more where it is close."""

    def measured(turn: int) -> Any:
        words = ("--one", name, "--most", str(most), "--turn", str(turn))
        return apart(__file__, *words, limit=LIMIT)

    (row,) = while_close(TURNS, measured, lambda parts: [row_of(name, parts)])
    return row


def known() -> dict[str, Row]:
    """Return the rows that there are."""
    return {r["model"]: r for r in json.loads(PLACE.read_text())["rows"]} if PLACE.exists() else {}


def put(row: Row, order: list[str]) -> None:
    """Put a row among the others, in the order of the zoo."""
    rows = {**known(), row["model"]: row}
    content = {"machine": machine(), "rows": [rows[n] for n in order if n in rows]}
    PLACE.write_text(json.dumps(content, indent=1) + "\n")


def told(row: Row) -> str:
    """Say how a model came out."""
    if "speedup" not in row:
        what = "FAILED" if row["passed"] is False else "inductor cannot:"
        return f"{row['model']:28} {what} {row['reason']}"
    speed, times = row["speedup"]["inductor"], row["milliseconds"]
    verdict = "" if row["passed"] else "  FAILED"
    interval = f"{speed['ratio']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]"
    return f"{row['model']:28} {times['attnopt']:9.3f} ms  {interval}{verdict}"


def main(arguments: list[str]) -> int:
    """Measure, print a line a model, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, anew")
    parser.add_argument("--failed", action="store_true", help="anew the models that failed")
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not SHARED.is_dir():
        print("skipped: ../shared absent")
        return 0
    sys.path[1:1] = [str(SHARED), str(ROOT / "tests")]
    if given.one:
        answer(measure(given.one, given.most, given.turn))
        return 0
    import zoo

    order, rows = list(zoo.ZOO), known()
    failed = [n for n in order if n in rows and rows[n]["passed"] is False]
    todo = given.only or (failed if given.failed else [n for n in order if n not in rows])
    for name in todo:
        row = alone(name, given.most)
        print(told(row), flush=True)
        put(row, order)
    verdicts = [row["passed"] for row in known().values()]
    limits = verdicts.count(None)
    told_limits = f", {limits} that plain inductor cannot compile" if limits else ""
    print(f"{verdicts.count(True)} of {len(verdicts) - limits} passed{told_limits}")
    return int(False in verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
