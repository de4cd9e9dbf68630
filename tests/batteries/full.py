"""Run every battery in full, each in a process of its own, and keep the counts.

python tests/batteries/full.py [--only NAME ...]   a name runs one; the counts of others stay
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
import transformers

NAMES: Final = ("harms", "hostile_paths", "canaries", "kills", "writers", "resuming", "planning")
_HOME: Final = Path(__file__).parent
_RESULTS: Final = _HOME.parent / "bench" / "results" / "batteries.json"


def run(name: str, seed: int) -> dict[str, Any]:
    """Run one battery and return its counts."""
    start = time.monotonic()
    command = [sys.executable, "-W", "ignore", str(_HOME / f"{name}.py"), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    counts = json.loads(lines[-1]) if lines else {"battery": name, "failures": ["no answer"]}
    return {**counts, "wall_s": round(time.monotonic() - start)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="all unless named")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kept = json.loads(_RESULTS.read_text())["rows"] if _RESULTS.is_file() else []
    rows = {row["battery"]: row for row in kept}
    failed = 0
    for name in arguments.only:
        rows[name] = row = run(name, arguments.seed)
        failed += len(row["failures"])
        print(json.dumps(row), flush=True)
        machine = {
            "processor": platform.processor() or platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        content = {"machine": machine, "rows": [rows[n] for n in NAMES if n in rows]}
        _RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
