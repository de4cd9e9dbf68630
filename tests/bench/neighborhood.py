"""What neighbourhoods cost a classifier, before and after healing, and what they save a processor.

python tests/bench/neighborhood.py
python tests/bench/neighborhood.py --steps 400 --side 128

The bundled vit-digits is rewritten at every layer, with tokens in the order of tiles. It is judged
by the 360 held-out digits; it learns from the others, of which an eighth is kept aside to watch.
Attention alone is timed on a square grid against dense scaled_dot_product_attention.
"""

import argparse
import sys
import warnings
from typing import Any

import torch
import transformers
from digits import classifier, digits, grid_tokens, judged, taught
from harness import as_row, compare, write
from torch.nn import functional

import attnopt
from attnopt.hoisting import permutations
from attnopt.neighborhoods import Neighborhood
from attnopt.nouns import Choice
from attnopt.ops import neighborhood_attention_reference
from attnopt.ops.boxes import attend_neighborhood
from attnopt.tilings import tiling
from attnopt.visits import search

WINDOWS = (9, 5, 3)
HEADS, WIDTH = 4, 64


def main(arguments: list[str] | None = None) -> int:
    """Measure the classifier, then attention alone, and print both."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rows = [*_classifier(options), *_attention(options)]
    if not options.dry:
        write("neighborhood", rows)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--steps", type=int, default=200, help="of healing; 0 heals nothing")
    parser.add_argument("--side", type=int, default=64, help="of the grid that is timed")
    parser.add_argument("--rounds", type=int, default=60, help="of timing, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


# -------------------------------------------------------------------------------------- classifier


def _classifier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the accuracy at each window, without training and healed."""
    teacher = classifier()
    learnt, held = digits()
    rows: list[dict[str, Any]] = []
    for window in options.windows:
        found = search((16, 16), (window, window), area=16)[0]
        for name, stride, tile in (("plain", (1, 1), (4, 4)), ("found", found.stride, found.tile)):
            config = {"window": window, "stride": list(stride), "tile": list(tile)}
            choices = tuple(Choice(s.name, "neighborhood", config) for s in teacher.sites)
            student = attnopt.apply(teacher, attnopt.Plan(choices))
            row = {
                "what": "vit-digits",
                "search": name,
                **config,
                **judged(student, teacher, held),
            }
            row["permutations"] = permutations(student.graph)
            if options.steps:
                row |= taught(student, teacher, learnt, held, options)
            rows.append(row)
            print(row, flush=True)
    return rows


# --------------------------------------------------------------------------------------- attention


def _attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return how fast attention on a grid is against dense attention, by window."""
    side = options.side
    (q, k, v), _ = grid_tokens(side, options.seed, HEADS, WIDTH)
    rows: list[dict[str, Any]] = []
    for window in (side // 2, side // 4, side // 8):
        for stride in (1, window):
            settings: dict[str, Any] = {
                "grid": [side, side], "window": [window] * 2, "stride": [stride] * 2,
                "dilation": [1, 1], "causal": [False, False],
            }  # fmt: skip
            rows.append(_timed(q, k, v, settings, options.rounds))
            print(rows[-1], flush=True)
    return rows


def _timed(q: Any, k: Any, v: Any, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    chosen = tiling(Neighborhood.of(**settings))
    found = attend_neighborhood(q, k, v, **settings)
    wanted = neighborhood_attention_reference(q, k, v, **settings)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    memo: dict[Any, Any] = {}
    calls = {
        "dense": lambda: functional.scaled_dot_product_attention(q, k, v),
        "first layer": lambda: attend_neighborhood(q, k, v, **settings, memo={}),
        "later layers": lambda: attend_neighborhood(q, k, v, **settings, memo=memo),
    }
    timing = compare(calls, base="dense", most=rounds)
    layers = ("first layer", "later layers")
    return {
        "what": "attention",
        "grid": settings["grid"],
        "window": settings["window"],
        "stride": settings["stride"],
        "tile": list(chosen.tile),
        "why": chosen.why,
        "error": float((found - wanted).abs().max()),
        "ms": {name: round(1e3 * timing.median(name), 3) for name in calls},
        "speedup": {name: as_row(timing.speedup(name, "dense")) for name in layers},
    }


if __name__ == "__main__":
    sys.exit(main())
