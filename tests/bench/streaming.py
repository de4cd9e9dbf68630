"""What a window costs: some key heads whole and the others windowed, beside a window on all heads.

    python tests/bench/streaming.py
    python tests/bench/streaming.py --draws 1 --rows 8

Excess held-out loss (nats a token over the source) at contexts of 1,024 tokens, by share of the
key heads that stay whole; the plain window on all heads keeps as many bytes at that length. Exit
status 1 where half of the heads whole costs more than half of what the plain window does.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import write
from torch import Tensor

import attnopt
from attnopt.data import Source, split_of
from attnopt.nouns import Choice, Plan
from attnopt.passes import window as streaming
from attnopt.program import Program
from attnopt.verifying import losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
TOKENS: Final = 1024
WINDOW, FIRST = 64, 16
SHARES: Final = (0.25, 0.5, 0.75)
JUDGED: Final = 0.5


def planned(program: Program, stats: Any, share: float) -> Plan:
    """Keep so large a share of the key heads whole, those that a window would spoil most."""
    held = share + (1 - share) * (WINDOW + FIRST) / TOKENS
    choices = streaming.allocate(program, stats, held, tokens=TOKENS, window=WINDOW, first=FIRST)
    return Plan(choices, statistics=stats)


def plain(program: Program, stats: Any, share: float) -> Plan:
    """Give all heads one window of as many bytes, with nothing beside it."""
    window = round(share * TOKENS + (1 - share) * (WINDOW + FIRST))
    config = {"window": window, "first": 0, "full": []}
    return Plan(tuple(Choice(s.name, "window", config) for s in program.sites), statistics=stats)


def plain_with_first(program: Program, stats: Any, share: float) -> Plan:
    """Give all heads one window of as many bytes, the first tokens among them."""
    window = round(share * TOKENS + (1 - share) * (WINDOW + FIRST)) - FIRST
    config = {"window": window, "first": FIRST, "full": []}
    return Plan(tuple(Choice(s.name, "window", config) for s in program.sites), statistics=stats)


METHODS: Final = {"ours": planned, "plain window": plain, "with first": plain_with_first}


def run(options: argparse.Namespace) -> tuple[float, dict[str, list[Tensor]]]:
    """Return the loss of the source, and the excess of each method by row and draw."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    program = attnopt.apply(attnopt.capture(options.model), "exact")
    base: Tensor | None = None
    found: dict[str, list[Tensor]] = {}
    for number in range(options.draws):
        source = Source("stdlib", options.calibration, TOKENS, seed=number)
        split = split_of(source, tokenizer, held_out=options.rows)
        stats = attnopt.calibrate(program, split)
        base = losses(program, split.held_out, "source") if base is None else base
        for share in SHARES:
            for name, method in METHODS.items():
                rewritten = attnopt.apply(program, method(program, stats, share))
                excess = losses(rewritten, split.held_out, "rewritten") - base
                found.setdefault(f"{share:.0%} whole: {name}", []).append(excess)
                shown = f"draw {number} {share:.0%} {name}: {float(excess.mean()):+.4f}"
                print(shown, file=sys.stderr, flush=True)
    assert base is not None
    return float(base.mean()), found


def main(arguments: list[str] | None = None) -> int:
    """Print one row a method, and whether the point is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--rows", type=int, default=24, help="held-out rows of 1,024 tokens")
    parser.add_argument("--calibration", type=int, default=8, help="rows to calibrate on")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base, found = run(options)
    means = {name: float(torch.stack(rows).mean()) for name, rows in found.items()}
    print(f"source: {base:.4f} nats a token; {options.draws} draws, {options.rows} rows")
    for name, rows in found.items():
        each = " ".join(f"{float(r.mean()):.4f}" for r in rows)
        print(f"{name:28} {means[name]:8.4f}   ({each})")
    part = means[f"{JUDGED:.0%} whole: ours"] / means[f"{JUDGED:.0%} whole: plain window"]
    met = part <= JUDGED
    print(f"{'met ' if met else 'FAIL'} half of the heads whole: {part:.3f} of a plain window")
    table: list[dict[str, Any]] = [{"setting": "source", "loss": base}]
    table += [
        {"setting": n, "excess": round(means[n], 5), "draws": [float(r.mean()) for r in rows]}
        for n, rows in found.items()
    ]
    table.append({"point": "half of the heads whole", "share": round(part, 4), "met": met})
    if not options.dry:
        write("streaming", table)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
