"""The planner beside every single pass: mixed plans at several budgets, and what they cost.

    python tests/bench/planner.py                  # three draws; goes on where it was stopped
    python tests/bench/planner.py --only-draw 1    # one of them; the table is of all there are
    python tests/bench/planner.py --draws 1 --kv 0.5 0.25 --params --rows 48 --to /tmp/small

Held-out loss (nats a token over the source) of the planner's choice at each budget, beside that of
every pass applied alike everywhere with the best setting that reaches the budget, paired row by
row and over draws of the calibration text; what was predicted beside what is measured; and the time
of a second budget as a share of the first's. What a draw has found for a goal is written to
results/planner_draws.json at once and never measured again (--anew forgets it). Exit status 1 where
the mixture is not better than a single pass in the mean over all draws, or where a prediction is
further off than a quarter and 0.01 nats.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import RESULTS, write

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
    left: dict[str, float]
    predicted: float
    chosen: str
    passes: list[str]
    mixed: list[float]
    alike: dict[str, list[float]]


def outcomes(
    program: Program, split: Split, goal: str, shares: Sequence[float], options: argparse.Namespace
) -> list[Outcome]:
    """Plan for each budget, the later ones with the scores of the first, and measure."""
    excess = Excess(program, split)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as work:
        for share in shares:
            start, used = time.perf_counter(), time.process_time()
            plan = attnopt.plan(
                program, {goal: share}, split, options.passes, tier=options.tier, work=work
            )
            # The time of this process alone, which others beside it do not lengthen.
            spent, used = time.perf_counter() - start, time.process_time() - used
            best = plan.search.best
            made = Outcome(
                goal,
                share,
                used if options.busy else spent,
                plan.search.made,
                dict(plan.provenance["left"]),
                best.cost,
                best.name,
                sorted({c.rewrite for c in plan.choices}),
                excess.of(plan, plan.choices),
                {n: excess.of(plan, choices) for n, choices in _best_of_each(plan).items()},
            )
            found.append(made)
            _print(made)
    return found


class Excess:
    """Held-out excess by row, of each list of choices once."""

    def __init__(self, program: Program, split: Split) -> None:
        self.program, self.split = program, split
        self.before = losses(program, split.held_out, "source")
        self._known: dict[str, list[float]] = {}

    def of(self, plan: Plan, choices: Any) -> list[float]:
        """Carry choices out with a plan's statistics, and judge them."""
        name = str([[c.site, c.rewrite, sorted(c.config.items())] for c in choices])
        if name not in self._known:
            made = attnopt.apply(self.program, Plan(choices, statistics=plan.statistics))
            rows = losses(made, self.split.held_out, "plan") - self.before
            self._known[name] = [round(float(x), 6) for x in rows]
        return self._known[name]


def _best_of_each(plan: Plan) -> dict[str, Any]:
    """Return, for each pass alike everywhere, what reaches the budget and damages least."""
    found: dict[str, Any] = {}
    search = plan.search
    told = [(t.cost, t) for t in search.tried] + [(f.predicted, f) for f in search.foregone]
    # The least cost on the calibration rows first, as it was measured or is predicted.
    for _, tried in sorted(told, key=lambda x: x[0]):
        if "everywhere" in tried.name:
            passes = "+".join(sorted({c.rewrite for c in tried.choices}))
            kinds = {"neurons" if c.config.get("neurons") else "heads" for c in tried.choices}
            found.setdefault(f"{passes} ({' and '.join(sorted(kinds))})", tried.choices)
    return found


def _print(found: Outcome) -> None:
    print(
        f"{found.goal} {found.share:.1%}: {_mean(found.mixed):+.4f} (predicted "
        f"{found.predicted:+.4f}; {found.seconds:.0f} s, {found.made} scores), "
        + ", ".join(f"{n} {_mean(x):+.4f}" for n, x in found.alike.items()),
        flush=True,
    )


def _mean(rows: Sequence[float]) -> float:
    return sum(rows) / len(rows)


def _joined(rows: Iterable[Sequence[float]]) -> list[float]:
    return [x for part in rows for x in part]


def rows_of(found: list[list[Outcome]]) -> list[dict[str, Any]]:
    """Return a row for each budget: all draws together, paired with each pass alike."""
    table: list[dict[str, Any]] = []
    for same in zip(*found, strict=True):
        mixed = _joined(o.mixed for o in same)
        beside: dict[str, Any] = {}
        for name in sorted({n for o in same for n in o.alike}):
            having = [o for o in same if name in o.alike]
            gap = [a - b for o in having for a, b in zip(o.mixed, o.alike[name], strict=True)]
            paired = Paired.of(torch.tensor(gap, dtype=torch.float64))
            excess = _mean(_joined(o.alike[name] for o in having))
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
                "left": [o.left for o in same],
                "excess": round(_mean(mixed), 4),
                "alike": beside,
                "predicted": [round(x, 4) for x in predicted],
                "measured": [round(x, 4) for x in measured],
                "prediction_holds": [
                    abs(p - m) <= max(SHARE * abs(m), NATS)
                    for p, m in zip(predicted, measured, strict=True)
                ],
                "best_of_all": all(x["mixed_less"][0] <= 0 for x in beside.values()),
                "chosen": [o.chosen for o in same],
                "passes": [o.passes for o in same],
                "seconds": [round(o.seconds, 1) for o in same],
                "scores": [o.made for o in same],
            }
        )
    return table


class Draws:
    """What was found so far, by draw and goal, in a file; other settings forget it."""

    def __init__(self, path: Path, options: dict[str, Any], *, anew: bool) -> None:
        named = ("kv", "params", "rows", "calibration", "tier", "passes", "busy")
        self.path = path
        self.settings = {name: options[name] for name in named}
        self.settings["model"] = options["model"].name
        self.held: dict[str, list[dict[str, Any]]] = {}
        if path.is_file() and not anew:
            found = json.loads(path.read_text())
            if found["settings"] != json.loads(json.dumps(self.settings)):
                raise SystemExit(f"{path} is of other settings; give --anew, or --to another place")
            self.held = found["draws"]

    def has(self, seed: int, goal: str) -> bool:
        """Whether a draw was measured for a goal."""
        return f"{seed} {goal}" in self.held

    def add(self, seed: int, goal: str, found: Sequence[Outcome]) -> None:
        """Keep what a draw has found, in one step."""
        self.held[f"{seed} {goal}"] = [asdict(o) for o in found]
        content = {"settings": self.settings, "draws": self.held}
        beside = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content) + "\n")
        beside.replace(self.path)

    def whole(self, goals: Sequence[str]) -> list[list[Outcome]]:
        """Return the draws that were measured for all goals."""
        seeds = sorted({int(name.split()[0]) for name in self.held})
        return [
            [Outcome(**o) for goal in goals for o in self.held[f"{seed} {goal}"]]
            for seed in seeds
            if all(self.has(seed, goal) for goal in goals)
        ]


def main() -> int:
    """Measure and write; say which points are not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--only-draw", type=int, help="measure one draw, and add it to the others")
    parser.add_argument("--anew", action="store_true", help="forget the draws of earlier runs")
    parser.add_argument("--busy", action="store_true", help="count CPU seconds: others run beside")
    parser.add_argument("--to", type=Path, default=RESULTS, help="where the results lie")
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
    kept = Draws(options.to / "planner_draws.json", vars(options), anew=options.anew)
    seeds = range(options.draws) if options.only_draw is None else [options.only_draw]
    for seed in seeds:
        source = Source("stdlib", options.calibration, 256, seed)
        split = split_of(source, tokenizer, held_out=options.rows)
        for goal, shares in goals:
            if not kept.has(seed, goal):
                print(f"draw {seed}, {goal}", flush=True)
                kept.add(seed, goal, outcomes(program, split, goal, shares, options))
    found = kept.whole([goal for goal, _ in goals])
    if not found:
        print("no draw is whole yet")
        return 1
    table = rows_of(found)
    for goal, _ in goals:
        of_goal = [row for row in table if row["goal"] == goal]
        first = of_goal[0]["seconds"]
        for row in of_goal[1:]:
            row["time_of_first"] = [
                round(s / f, 4) for s, f in zip(row["seconds"], first, strict=True)
            ]
    print(write("planner", table, options.to))
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
