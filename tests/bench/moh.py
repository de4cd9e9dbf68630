"""What it costs and saves that each token uses some heads only: pass moh.

    python tests/bench/moh.py
    python tests/bench/moh.py --parts quality --rows 24 --draws 1
    python tests/bench/moh.py --parts times --tokens 1024 --rounds 7

`quality`: excess held-out loss of a bundled model with 6 and 4 of 8 heads on, without training, by
mode, beside static pruning of as many heads (pass amp with a ridge; the best of its scores). Both
are shown with as many heads on average, too, spread over the layers by the same measured damage:
that is told, and decides nothing.
`healing`: what is left of that at 4 of 8 after distillation. `times`: the op with half of the heads
on, beside all of them, and beside the masked form that computes all and hides half; compared after
the results were. A part takes its place among the results that there are of the others. Exit status
1 where a point of acceptance fails.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import RESULTS, as_row, compare, machine
from torch import Tensor

import attnopt
from attnopt.calibrating import Statistics
from attnopt.data import Source, Split, split_of
from attnopt.healing import Recipe, healed
from attnopt.nouns import Choice, Plan
from attnopt.ops.packed import attend_routed
from attnopt.ops.routed import gated
from attnopt.ops.sdpa import attend
from attnopt.program import Program
from attnopt.spreading import spread
from attnopt.verifying import losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
RESULT: Final = RESULTS / "moh.json"
HEADS: Final = (6, 4)
LENGTHS: Final = (1024, 2048, 4096)
# Of a call that is timed: query heads, key heads, channels. The first is judged.
SHAPES: Final = ((32, 8, 128), (8, 8, 64), (8, 8, 128))
SCORES: Final = ("obs", "amp", "flap", "l2")
MODES: Final = {
    "norm": {"score": "norm", "refit": False},
    "scaled norm + refit": {"score": "scaled"},
    "fitted": {"refit": False},
    "fitted + refit": {},
    "group": {"mode": "group"},
}
OURS: Final = "fitted + refit"
SPREAD: Final = ", spread"
LARGEST_EXCESS: Final = 0.75
LARGEST_LEFT: Final = 1 / 3
LARGEST_TIME: Final = 0.62
RECIPE: Final = {"site_steps": 30, "site_lr": 4e-3, "lr": 1e-3, "train": "all", "every": 40}
HEALED: Final = {"dynamic": {}, "trained": {"mode": "trained", "shared": 1}}
# Output projections that are solved for few heads begin with few; routers begin with all.
ANNEALED: Final = {"dynamic": {"anneal": 0.0}, "trained": {}}


@dataclass(frozen=True)
class Point:
    """One point of acceptance, and whether it is met; some are told and not asked for."""

    what: str
    found: str
    met: bool
    asked: bool = True

    def __str__(self) -> str:
        verdict = "FAIL" if self.asked else "no  "
        return f"{'met ' if self.met else verdict} {self.what}: {self.found}"


# ----------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Draw:
    """A program, what calibration saw of it with one draw of the text, and its held-out loss."""

    program: Program
    stats: Statistics
    split: Split
    base: Tensor

    def excess(self, rewrite: str, **config: Any) -> float:
        """Return the excess loss of one setting at every attention."""
        made = losses(self.applied(rewrite, **config), self.split.held_out, "rewritten")
        return float((made - self.base).mean())

    def applied(self, rewrite: str, **config: Any) -> Program:
        """Carry one setting out at every attention."""
        average = None if rewrite == "moh" else config.pop("average", None)
        kept = {} if average is None else self.pruned(average, **config)
        choices = tuple(
            Choice(s.name, rewrite, config | kept.get(s.name, {})) for s in self.program.sites
        )
        return attnopt.apply(self.program, Plan(choices, statistics=self.stats))

    def pruned(self, average: float, **config: Any) -> dict[str, dict[str, int]]:
        """Spread what static pruning leaves over the layers, as pass moh spreads what is on."""
        alone = {**config, "refit": False}
        ways = {
            s.name: {
                n: Choice(s.name, "amp", {**alone, "groups": s.kv_heads - n})
                if n < s.kv_heads
                else None
                for n in range(1, s.kv_heads + 1)
            }
            for s in self.program.sites
        }
        found = spread(self.program, self.stats, ways, average)
        return {s.name: {"groups": s.kv_heads - found[s.name]} for s in self.program.sites}


def draw(program: Program, seed: int, rows: int) -> Draw:
    """Calibrate with a draw of the text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    split = split_of(Source("stdlib", 48, 256, seed=seed), tokenizer, held_out=rows)
    base = losses(program, split.held_out, "source")
    return Draw(program, attnopt.calibrate(program, split), split, base)


def quality(rows: int, draws: int) -> Iterator[dict[str, Any]]:
    """Measure excess losses without training."""
    program = attnopt.apply(attnopt.capture(MODEL), "exact")
    known = [draw(program, seed, rows) for seed in range(draws)]
    yield {"what": "source", "loss": round(float(known[0].base.mean()), 4), "rows": rows}
    for heads in HEADS:
        for name, (rewrite, config) in settings(heads).items():
            each = [now.excess(rewrite, **config) for now in known]
            yield {
                "what": "quality",
                "heads": heads,
                "method": name,
                "excess": round(sum(each) / len(each), 4),
                "draws": [round(x, 4) for x in each],
            }


def settings(heads: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """List the ways to have so many of 8 heads on, or left."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("moh", {"heads": heads, **config}) for name, config in MODES.items()
    }
    for score in SCORES:
        for refit in (False, True):
            pruned = {"groups": 8 - heads, "score": score, "refit": refit}
            found[f"static, {score}{' + refit' if refit else ''}"] = ("amp", pruned)
    found[OURS + SPREAD] = ("moh", {"average": float(heads)})
    for score in ("obs", "flap"):
        spread_out = {"average": float(heads), "score": score, "refit": True}
        found[f"static, {score} + refit{SPREAD}"] = ("amp", spread_out)
    return found


def healing(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Heal at half of the heads, both ways of choosing them."""
    rows = options.rows
    program = attnopt.apply(attnopt.capture(MODEL), "exact")
    now = draw(program, 0, rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    source = Source("stdlib", options.learned, 256, seed=1)
    text = split_of(source, tokenizer, held_out=2 * rows)
    for name in options.modes:
        recipe = Recipe(options.steps, **{**RECIPE, **ANNEALED[name], **options.recipe})
        start = time.perf_counter()
        result = healed(now.applied("moh", heads=4, **HEALED[name]), program, text, recipe)
        yield {
            "what": "healing",
            "mode": name,
            "before": round(result.before.delta_nll.mean, 4),
            "after": round(result.after.delta_nll.mean, 4),
            "ci95": [round(x, 4) for x in result.after.delta_nll.ci95],
            "steps": result.steps,
            "tokens": result.tokens,
            "seconds": round(time.perf_counter() - start),
            "recipe": asdict(recipe),
            "looks": [[look["step"], round(look["excess"], 4)] for look in result.looks],
        }


# ------------------------------------------------------------------------------------------- times


def times(shape: tuple[int, int, int], tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Time a causal prefill, and a step after it."""
    heads, key_heads, width = shape
    chance = torch.Generator().manual_seed(0)
    q = torch.randn(1, tokens, heads, width, generator=chance).transpose(1, 2)
    k, v = (torch.randn(1, key_heads, tokens, width, generator=chance) for _ in range(2))
    # Heads are not used alike: the least of them by half as many tokens as the most.
    liked = (
        torch.rand(1, heads, tokens, generator=chance) * torch.linspace(0.7, 1.3, heads)[:, None]
    )
    gates = torch.zeros_like(liked).scatter(1, liked.topk(heads // 2, dim=1).indices, 1.0)
    groups = torch.zeros(1, key_heads, 1)
    groups[:, ::2] = 1.0
    groups = groups.repeat_interleave(heads // key_heads, dim=1)
    one = q[:, :, -1:]
    for what, queries, mask in (("prefill", q, gates), ("step", one, groups)):
        calls: dict[str, Callable[[], Tensor]] = {
            "all": lambda x=queries: attend(x, k, v, {}, causal=True),
            "half": lambda x=queries, m=mask: attend_routed(x, k, v, m, memo={}, causal=True),
            "masked": lambda x=queries, m=mask: gated(attend(x, k, v, {}, causal=True), m),
        }
        torch.testing.assert_close(calls["half"](), calls["masked"](), rtol=1e-3, atol=1e-4)
        timing = compare(calls, base="all", most=rounds)
        yield {
            "what": what,
            "shape": list(shape),
            "tokens": tokens,
            "all milliseconds": round(1e3 * timing.median("all"), 2),
            "half over all": as_row(timing.speedup("all", "half")),
            "masked over all": as_row(timing.speedup("all", "masked")),
        }


# ------------------------------------------------------------------------------------------ points


def points(rows: list[dict[str, Any]]) -> list[Point]:
    """Judge what was measured."""
    judged: list[Point] = []
    for heads in HEADS:
        found = {r["method"]: r["excess"] for r in rows if r.get("heads") == heads}
        for last in ("", SPREAD) if found else ():
            static = [
                m for m in found if m.startswith("static") and m.endswith(SPREAD) == bool(last)
            ]
            best = min(static, key=lambda m: found[m])
            ratio = found[OURS + last] / found[best]
            what = f"{heads} of 8 heads on{last}: at most {LARGEST_EXCESS} of {best}"
            judged.append(Point(what, f"{ratio:.3f}", ratio <= LARGEST_EXCESS, asked=not last))
    free = [r["excess"] for r in rows if r.get("heads") == 4 and r["method"] == OURS]
    for row in rows:
        if row["what"] == "healing" and row["mode"] == "dynamic":
            left = row["after"] / (free[0] if free else row["before"])
            what = f"healed at 4 of 8: at most {LARGEST_LEFT:.2f} of the excess is left"
            judged.append(Point(what, f"{left:.3f}", left <= LARGEST_LEFT))
        if row["what"] == "prefill" and tuple(row["shape"]) == SHAPES[0]:
            ratio = row["half over all"]["ratio"]
            what = f"half of the heads at {row['tokens']:,} tokens: at most {LARGEST_TIME} of all"
            judged.append(Point(what, f"{ratio:.3f}", ratio <= LARGEST_TIME))
    return judged


@torch.no_grad()
def timed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all shapes at all lengths."""
    for shape in SHAPES:
        for tokens in options.tokens:
            yield from times(shape, tokens, options.rounds)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line a row, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["quality", "healing", "times"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--rows", type=int, default=96, help="held-out rows of 256 tokens")
    parser.add_argument("--draws", type=int, default=3, help="of the calibration text")
    parser.add_argument("--steps", type=int, default=800, help="of healing")
    parser.add_argument("--modes", nargs="+", default=list(HEALED), choices=list(HEALED))
    parser.add_argument("--recipe", type=json.loads, default={}, help="of healing, as JSON")
    parser.add_argument("--learned", type=int, default=4096, help="rows to heal with")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    measured = {
        "quality": lambda: quality(options.rows, options.draws),
        "healing": lambda: healing(options),
        "times": lambda: timed(options),
    }
    content = _known()
    for name in options.parts:
        found: list[dict[str, Any]] = []
        for row in measured[name]():
            print(row, flush=True)
            found.append(row)
        content[name] = {"machine": machine(), "rows": found}
        judged = points([row for part in parts for row in content.get(part, {}).get("rows", ())])
        content["points"] = [
            {"point": p.what, "found": p.found, "met": p.met, "asked": p.asked} for p in judged
        ]
        if not options.dry:
            RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for point in judged:
        print(point)
    return 0 if all(point.met or not point.asked for point in judged) else 1


def _known() -> dict[str, Any]:
    """Return what was measured before, by part."""
    return dict(json.loads(RESULT.read_text())) if RESULT.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
