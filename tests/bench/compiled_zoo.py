"""Time every model of the zoo compiled: backend "attnopt" beside plain inductor, on the same call.

    python tests/bench/compiled_zoo.py                    # the models that have no row yet
    python tests/bench/compiled_zoo.py --only llama bert  # anew

Each model is compiled by both backends in a process of its own, with the attention that
Transformers chooses for it and fixed sizes, compared with the stock model, and timed in interleaved
rounds. The models are tiny, so that this weighs what is done beside the arithmetic; compiled.py
times larger ones. Rows are written as they come. Exit status 1 where results differ or where the
interval of the speedup ends below 1.
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Final

from harness import RESULTS, as_row, compare, machine

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "zoo"
PLACE: Final = RESULTS / "compiled_zoo.json"
BACKENDS: Final = ("inductor", "attnopt")
LIMIT: Final = 600
TOLERANCE: Final = 1e-3
"""Of the largest value: what float32 may differ by; parity proper is the business of the tests."""

Row = dict[str, Any]


def measure(name: str, most: int) -> Row:
    """Compile one model with both backends, compare and time them."""
    import torch
    import transformers
    import zoo
    import zoo_parity

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, call, _ = zoo.build(name, None)
    runs = {b: torch.compile(model, backend=b, dynamic=False) for b in BACKENDS}
    with torch.no_grad():
        torch.manual_seed(0)
        want = zoo_parity.compared(model(**call))
        worst = {}
        for backend, run in runs.items():
            torch.manual_seed(0)
            worst[backend] = farthest(zoo_parity.compared(run(**call)), want)
        calls = {backend: lambda r=run: r(**call) for backend, run in runs.items()}
        timing = compare(calls, base="attnopt", most=most)
    speed = timing.speedup("attnopt", "inductor")
    return {
        "model": name,
        "milliseconds": {b: round(1e3 * timing.median(b), 4) for b in BACKENDS},
        "speedup": as_row(speed),
        "rounds": len(timing.seconds["attnopt"]),
        "differs": worst,
        "passed": worst["attnopt"] <= TOLERANCE and speed.high >= 1,
    }


def farthest(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Return the largest difference as a share of the largest value."""
    return max(
        float((got[n].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-9))
        for n, x in want.items()
    )


def alone(name: str, most: int) -> Row:
    """Measure a model in a process of its own; what it dies of is its row."""
    words = [sys.executable, __file__, "--one", name, "--most", str(most)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "passed": False, "reason": f"took more than {LIMIT} s"}
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x and not x.startswith((" ", "Set TORCH"))]
        return {"model": name, "passed": False, "reason": " ".join(lines[-2:])[-300:]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
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
        return f"{row['model']:28} FAILED {row['reason']}"
    speed, times = row["speedup"], row["milliseconds"]
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
    given = parser.parse_args(arguments)
    if not SHARED.is_dir():
        print("skipped: ../shared absent")
        return 0
    sys.path[1:1] = [str(SHARED), str(ROOT / "tests")]
    if given.one:
        print(json.dumps(measure(given.one, given.most)))
        return 0
    import zoo

    order, rows = list(zoo.ZOO), known()
    failed = [n for n in order if n in rows and not rows[n]["passed"]]
    todo = given.only or (failed if given.failed else [n for n in order if n not in rows])
    for name in todo:
        row = alone(name, given.most)
        print(told(row), flush=True)
        put(row, order)
    rows = known()
    print(f"{sum(r['passed'] for r in rows.values())} of {len(rows)} passed")
    return int(not all(r["passed"] for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
