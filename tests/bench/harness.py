"""What the benchmarks share: who measured, and where the results go."""

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from attnopt.timing import Interval as Interval
from attnopt.timing import Timing as Timing
from attnopt.timing import compare as compare

RESULTS: Final = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Say where and how this was measured."""
    import transformers

    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write rows and the machine to results/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}.json"
    place.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return place


def as_row(interval: Interval) -> dict[str, float]:
    """Return an interval as plain numbers."""
    return {name: round(x, 4) for name, x in asdict(interval).items()}
