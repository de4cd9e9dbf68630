"""What fusing key and value heads costs: the closed form beside the published merges.

python tests/bench/heads.py --draws 5 --ratios 2 4 8

Excess held-out loss (nats a token over the source) of a checkpoint at several ratios, by merge and
by draw of the calibration text; the held-out rows are the same for all. `refit` solves the output
projections anew and is measured for the closed form and for the best baseline.
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import write

import attnopt
from attnopt.data import Source, split_of
from attnopt.nouns import Choice
from attnopt.verifying import losses

MODEL = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
SETTINGS = (
    ("mean", False),
    ("mean_renorm", False),
    ("first", False),
    ("procrustes", False),
    ("procrustes_renorm", False),
    ("procrustes", True),
    ("planes", False),
    ("planes", True),
)


def main(arguments: list[str] | None = None) -> int:
    """Print one row a setting and ratio: the mean over the draws, and each draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    program = attnopt.apply(attnopt.capture(options.model), "exact")
    found: dict[str, list[float]] = {}
    base: torch.Tensor | None = None
    for draw in range(options.draws):
        source = Source("stdlib", options.rows, options.length, seed=draw)
        split = split_of(source, tokenizer)
        base = losses(program, split.held_out, "source") if base is None else base
        stats = attnopt.calibrate(program, split)
        for ratio in options.ratios:
            for merge, refit in SETTINGS:
                after = losses(_fused(program, stats, ratio, merge, refit), split.held_out, merge)
                name = f"{ratio}:1 {merge}{' + refit' if refit else ''}"
                found.setdefault(name, []).append(float((after - base).mean()))
                print(f"draw {draw} {name}: {found[name][-1]:+.4f}", file=sys.stderr, flush=True)
    assert base is not None
    print(f"source: {float(base.mean()):.4f} nats a token; {options.draws} draws, torch "
          f"{torch.__version__}, {options.rows} x {options.length} tokens")  # fmt: skip
    for name, values in found.items():
        each = " ".join(f"{v:.4f}" for v in values)
        print(f"{name:32} {statistics.mean(values):8.4f}   ({each})")
    rows = [
        {"setting": name, "excess": statistics.mean(v), "draws": [round(x, 5) for x in v]}
        for name, v in found.items()
    ]
    write("heads", [{"setting": "source", "loss": float(base.mean())}, *rows])
    return 0


def _fused(program: Any, stats: Any, ratio: int, merge: str, refit: bool) -> Any:
    choices = tuple(
        Choice(s.name, "dha", {"kv_heads": s.kv_heads // ratio, "merge": merge, "refit": refit})
        for s in program.sites
    )
    stats.refits.clear()
    return attnopt.apply(program, attnopt.Plan(choices, statistics=stats))


if __name__ == "__main__":
    sys.exit(main())
