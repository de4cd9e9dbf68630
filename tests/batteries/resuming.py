"""Kill `attnopt optimize`, and run the same command again: it writes what an unkilled run writes.

Beside it: what is saved in seven files as tier 0 loads in plain Transformers in a fresh process.
"""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from subjects import Subjects, main, weight_files

from attnopt.cli import main as command

FULL: Final = 20


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {n: t for place in weight_files(out) for n, t in load_file(place).items()}


def optimized(arguments: list[str], kill_after: float | None = None) -> float:
    """Optimize in a child, and kill it after so many seconds; return how long it took."""
    start = time.perf_counter()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):  # the parent reads the status
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                status = command(arguments)
        os._exit(status)
    if kill_after is None:
        _, status = os.waitpid(child, 0)
        assert status == 0, f"optimize ended with status {os.waitstatus_to_exitcode(status)}"
    else:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return time.perf_counter() - start


def loads_without_attnopt(subjects: Subjects) -> None:
    """Load seven weight files of tier 0 in a process that has no attnopt."""
    out = subjects.artifact(0, subjects.folder / "sharded", 1.5)
    code = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})
assert {{float(v) for p in model.parameters() for v in p.unique()}} == {{1.5}}
assert not any(name.startswith("attnopt") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Kill at so many moments, each time with an empty place or what the last run left there."""
    draw = random.Random(seed)
    failures: list[str] = []
    data, folder = subjects.folder / "rows.safetensors", subjects.folder / "optimized"
    rows = torch.randint(2, 61, (48, 24), generator=torch.Generator().manual_seed(seed))
    save_file({"input_ids": rows}, data)
    goal = ["--kv-cache", "50%", "--data", f"{data}:48x24", "--held-out", "4", "--quiet"]

    def arguments(out: Path) -> list[str]:
        return ["optimize", str(subjects.source), "-o", str(out), *goal]

    whole = optimized(arguments(folder / "whole"))
    wanted = tensors(folder / "whole")
    out = folder / "killed"
    for _ in range(points):
        moment = draw.uniform(0.3, 1.0) * whole
        optimized(arguments(out), kill_after=moment)
        optimized(arguments(out))
        found = tensors(out)
        same = found.keys() == wanted.keys() and all(
            torch.equal(found[n], wanted[n]) for n in found
        )
        left = sorted(p.name for p in folder.iterdir())
        if not same or left != ["killed", "whole"]:
            failures.append(
                f"killed after {moment:.2f} of {whole:.2f} s: same {same}, there {left}"
            )
    try:
        loads_without_attnopt(subjects)
    except AssertionError as error:
        failures.append(f"seven files in plain Transformers: {error}")
    return {"points": points, "seconds": round(whole, 2), "failures": failures}


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
