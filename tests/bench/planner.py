"""The planner beside every single pass: mixed plans at several budgets, and what they cost.

    python tests/bench/planner.py
    python tests/bench/planner.py --draws 1 --kv 0.5 --params --rows 48

Held-out loss (nats a token over the source) of the planner's choice at each budget, beside that of
every pass applied alike everywhere with the best setting that reaches the budget, paired row by
row and over draws of the calibration text; what was predicted beside what is measured; and the time
of a second budget as a share of the first's. Exit status 1 where the mixture is not better than a
single pass in the mean over all draws, or where a prediction is further off than a quarter and
0.01 nats.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import write
from torch import Tensor

import attnopt
from attnopt.data import Source, Split, split_of
from attnopt.nouns import Plan
from attnopt.program import Program
from attnopt.verifying import Paired, losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
KV: Final = (0.75, 0.5, 0.375, 0.25, 0.125)
PARAMS: Final = (0.9, 0.8, 0.7)
# How far a prediction may be off: a share of what is measured, or so many nats.
SHARE: Final = 0.25
NATS: Final = 0.01


@dataclass(frozen=True)
class Outcome:
    """One budget of one draw: held-out excess by row of the mixture and of each pass alike."""

    goal: str
    share: float
    seconds: float
    made: int
    plan: Plan
    predicted: float
    mixed: Tensor
    alike: dict[str, Tensor]


def outcomes(
    program: Program, split: Split, goal: str, shares: Sequence[float], options: argparse.Namespace
) -> list[Outcome]:
    """Plan for each budget, the later ones with the scores of the first, and measure."""
    before = losses(program, split.held_out, "source")
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as work:
        for share in shares:
            start = time.perf_counter()
            plan = attnopt.plan(
                program, {goal: share}, split, options.passes, tier=options.tier, work=work
            )
            spent = time.perf_counter() - start
            mixed = _excess(program, plan, plan.choices, split, before)
            alike = {
                name: _excess(program, plan, choices, split, before)
                for name, choices in _best_of_each(plan).items()
            }
            search = plan.search
            made = Outcome(goal, share, spent, search.made, plan, search.best.cost, mixed, alike)
            found.append(made)
            _print(made)
    return found


def _best_of_each(plan: Plan) -> dict[str, Any]:
    """Return, for each pass alike everywhere, what reaches the budget and damages least."""
    found: dict[str, Any] = {}
    for tried in plan.search.tried:
        if "everywhere" in tried.name:
            passes = "+".join(sorted({c.rewrite for c in tried.choices}))
            kinds = {"neurons" if c.config.get("neurons") else "heads" for c in tried.choices}
            # They come with the least cost on the calibration rows first.
            found.setdefault(f"{passes} ({' and '.join(sorted(kinds))})", tried.choices)
    return found


def _excess(program: Program, plan: Plan, choices: Any, split: Split, before: Tensor) -> Tensor:
    made = attnopt.apply(program, Plan(choices, statistics=plan.statistics))
    return losses(made, split.held_out, "plan") - before


def _print(found: Outcome) -> None:
    print(
        f"{found.goal} {found.share:.1%}: {_mean(found.mixed):+.4f} (predicted "
        f"{found.predicted:+.4f}; {found.seconds:.0f} s, {found.made} scores), "
        + ", ".join(f"{n} {_mean(x):+.4f}" for n, x in found.alike.items()),
        flush=True,
    )


def _mean(rows: Tensor) -> float:
    return float(rows.mean())


def rows_of(found: list[list[Outcome]]) -> list[dict[str, Any]]:
    """Return a row for each budget: all draws together, paired with each pass alike."""
    table: list[dict[str, Any]] = []
    for same in zip(*found, strict=True):
        mixed = torch.cat([o.mixed for o in same])
        beside: dict[str, Any] = {}
        for name in sorted({n for o in same for n in o.alike}):
            having = [o for o in same if name in o.alike]
            gap = torch.cat([o.mixed - o.alike[name] for o in having])
            paired = Paired.of(gap)
            excess = _mean(torch.cat([o.alike[name] for o in having]))
            beside[name] = {
                "excess": round(excess, 4),
                "mixed_less": [round(x, 4) for x in (paired.mean, *paired.ci95)],
            }
        predicted = [o.predicted for o in same]
        measured = [_mean(o.mixed) for o in same]
        table.append(
            {
                "goal": same[0].goal,
                "share": same[0].share,
                "left": [o.plan.provenance["left"] for o in same],
                "excess": round(_mean(mixed), 4),
                "alike": beside,
                "predicted": [round(x, 4) for x in predicted],
                "measured": [round(x, 4) for x in measured],
                "prediction_holds": [
                    abs(p - m) <= max(SHARE * abs(m), NATS)
                    for p, m in zip(predicted, measured, strict=True)
                ],
                "best_of_all": all(x["mixed_less"][0] <= 0 for x in beside.values()),
                "chosen": [o.plan.search.best.name for o in same],
                "passes": [sorted({c.rewrite for c in o.plan.choices}) for o in same],
                "seconds": [round(o.seconds, 1) for o in same],
                "scores": [o.made for o in same],
            }
        )
    return table


def main() -> int:
    """Measure and write; say which points are not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--kv", type=float, nargs="*", default=KV)
    parser.add_argument("--params", type=float, nargs="*", default=PARAMS)
    parser.add_argument("--rows", type=int, default=96, help="held-out rows")
    parser.add_argument("--calibration", type=int, default=48, help="rows to calibrate with")
    parser.add_argument("--tier", type=int, default=2)
    parser.add_argument("--passes", nargs="*", default=None)
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    program = attnopt.apply(attnopt.capture(str(options.model)), "exact")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    goals = [(g, s) for g, s in (("kv_cache", options.kv), ("params", options.params)) if s]
    found: list[list[Outcome]] = []
    for seed in range(options.draws):
        source = Source("stdlib", options.calibration, 256, seed)
        split = split_of(source, tokenizer, held_out=options.rows)
        print(f"draw {seed}", flush=True)
        found.append([o for g, s in goals for o in outcomes(program, split, g, s, options)])
    table = rows_of(found)
    for goal, _ in goals:
        of_goal = [row for row in table if row["goal"] == goal]
        first = of_goal[0]["seconds"]
        for row in of_goal[1:]:
            row["time_of_first"] = [
                round(s / f, 4) for s, f in zip(row["seconds"], first, strict=True)
            ]
    print(write("planner", table))
    missed = [
        f"{row['goal']} {row['share']:.1%}: {what}"
        for row in table
        for what, met in (
            ("a single pass is better", row["best_of_all"]),
            ("the prediction is off", all(row["prediction_holds"])),
            ("planning again takes long", max(row.get("time_of_first", [0])) < 0.1),
        )
        if not met
    ]
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
