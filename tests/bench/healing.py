"""What healing brings back of what a rewrite lost: the excess loss before and after, and its price.

python tests/bench/healing.py
python tests/bench/healing.py --students 'dha={"kv_heads": 4}' out/pruned --steps 400

A student is made by one pass with one setting at every attention, with the statistics of 48 rows of
text, or is a saved artifact. It learns from other rows of the calibration half; the rows that it is
judged by are of held-out files, and neither training nor the choice of the best step sees them.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import write

import attnopt
from attnopt.cli._output import Output
from attnopt.data import Source, Split, split_of
from attnopt.healing import Healing, Recipe, healed
from attnopt.nouns import Choice

MODEL = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
JUDGED = 48
STEPS, ROWS = 200, 4096
# A small model's weights take large steps. Autocast pays where the processor has bfloat16 itself.
RECIPE = {"site_steps": 120, "site_lr": 4e-3, "lr": 5e-4, "dtype": "bfloat16", "every": 40}


def main(arguments: list[str] | None = None) -> int:
    """Heal the students and print what each gained."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    teacher = attnopt.apply(attnopt.capture(options.model), "exact")
    source = Source("stdlib", options.rows, options.length, seed=options.seed + 1)
    text = split_of(source, tokenizer, held_out=2 * JUDGED)
    recipe = Recipe(options.steps, **{**RECIPE, **options.recipe, "seed": options.seed})
    rows: list[dict[str, Any]] = []
    for name in options.students:
        student = _student(name, teacher, tokenizer, options.length)
        start, worked = time.perf_counter(), time.process_time()
        with Output().progress() as stages, stages.stage("heal"):
            result = healed(student, teacher, text, recipe)
        spent = {
            "seconds": round(time.perf_counter() - start, 1),
            "processor_seconds": round(time.process_time() - worked, 1),
        }
        rows.append({"student": name, **_row(result, text), **spent, "recipe": asdict(recipe)})
        _print(rows[-1], result)
    if not options.dry:
        write("healing", rows)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--students",
        nargs="+",
        metavar="PASS=CONFIG",
        default=['dha={"kv_heads": 2}'],
        help="a pass and its setting as JSON, or the directory of an artifact",
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--recipe", type=json.loads, default={}, help="other settings, as JSON")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def _student(name: str, teacher: Any, tokenizer: Any, length: int) -> Any:
    rewrite, equals, config = name.partition("=")
    if not equals:
        return attnopt.capture(name)
    stats = attnopt.calibrate(teacher, split_of(Source("stdlib", 48, length), tokenizer))
    choices = tuple(Choice(s.name, rewrite, json.loads(config)) for s in teacher.sites)
    return attnopt.apply(teacher, attnopt.Plan(choices, statistics=stats))


def _row(result: Healing, rows: Split) -> dict[str, Any]:
    before, after = result.before.delta_nll, result.after.delta_nll
    return {
        "source": round(result.before.base, 4),
        "before": round(before.mean, 4),
        "after": round(after.mean, 4),
        "ci95": [round(x, 4) for x in after.ci95],
        "left": round(result.left, 4),
        "steps": result.steps,
        "kept_from": result.best_at,
        "tokens": result.tokens,
        "distinct": rows.calibration.numel(),
        "judged": result.after.tokens,
        "learned": result.learned,
        "stopped": result.stopped,
    }


def _print(row: dict[str, Any], result: Healing) -> None:
    for name, value in row.items():
        print(f"{name:18} {value}")
    for look in result.looks:
        print(f"  {look['stage']:8} step {look['step']:5}  excess {look['excess']:+.4f}")


if __name__ == "__main__":
    sys.exit(main())
