"""Kill -9 `attnopt optimize` while it plans, at random moments, and give the same command again.

Plan, statistics and tensors must be those of a run that nobody killed, to the last bit, however
often and wherever it was killed; nothing but scores and statistics is left beside the result. What
writes nothing is done once, before: the model is captured and proved in this process, and every run
is a child of it that begins with the data, so that all moments fall where something is written.
"""

import hashlib
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from resuming import optimized
from safetensors.torch import save_file
from subjects import Subjects, main, weight_files

import attnopt
from attnopt.cli._wanted import WORK

FULL: Final = 50


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Kill at so many moments; every third command starts from nothing, others where it stands."""
    known = attnopt.apply(attnopt.capture(subjects.source), "exact")
    with mock.patch.object(attnopt, "capture", return_value=known):
        return _killed(subjects, points, seed)


def _killed(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    data, folder = subjects.folder / "rows.safetensors", subjects.folder / "planned"
    rows = torch.randint(2, 61, (32, 24), generator=torch.Generator().manual_seed(seed))
    save_file({"input_ids": rows}, data)
    goal = ["--kv-cache", "50%", "--tier", "2", "--passes", "dha", "window", "--data"]
    goal += [f"{data}:24x24", "--held-out", "4", "--quiet"]

    def arguments(out: Path) -> list[str]:
        return ["optimize", str(subjects.source), "-o", str(out), *goal]

    start = time.perf_counter()
    whole = optimized(arguments(folder / "first" / "out"))
    wanted = prints(folder / "first" / "out")
    place, killed, failures = folder / "killed", 0, list[str]()
    while killed < points:
        shutil.rmtree(place, ignore_errors=True)
        moments: list[float] = []
        for _ in range(min(draw.choice((1, 2, 3)), points - killed)):
            moments.append(draw.uniform(0.0, 1.0) * whole)
            optimized(arguments(place / "out"), kill_after=moments[-1])
            killed += 1
        optimized(arguments(place / "out"))
        left = sorted(p.name for p in place.iterdir())
        if prints(place / "out") != wanted or left != sorted([WORK, "out"]):
            when = ", ".join(f"{m:.2f}" for m in moments)
            failures.append(f"killed after {when} of {whole:.2f} s: there {left}")
    spent = time.perf_counter() - start
    told = {"seconds": round(whole, 2), "seconds_of_all": round(spent, 1)}
    return {"points": points, **told, "failures": failures}


def prints(out: Path) -> dict[str, str]:
    """Return the sha256 of the plan, of its statistics, and of every file of weights."""
    files = [out / "attnopt" / "plan.yaml", out / "attnopt" / "statistics.safetensors"]
    return {
        str(place.relative_to(out)): hashlib.sha256(place.read_bytes()).hexdigest()
        for place in (*files, *weight_files(out))
    }


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
