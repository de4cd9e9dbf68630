"""What healing brings back of what a rewrite lost: the excess loss before and after, and its price.

python tests/bench/healing.py
python tests/bench/healing.py --rewrite dha --config '{"kv_heads": 4}' --steps 400
python tests/bench/healing.py --student out/pruned

The student is made by one pass with one setting at every attention, with the statistics of 48 rows
of text, or is a saved artifact. It learns from other rows of the calibration half; the rows that it
is judged by are held-out files that neither training nor the choice of the best step has seen.
"""

import argparse
import json
import sys
import time
import warnings
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
RECIPE = (
    '{"site_steps": 120, "site_lr": 4e-3, "lr": 5e-4, "dtype": "bfloat16", "every": 40, "batch": 8}'
)


def main(arguments: list[str] | None = None) -> int:
    """Heal one student and print one row."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    teacher = attnopt.apply(attnopt.capture(options.model), "exact")
    student = _student(teacher, tokenizer, options)
    learned = split_of(
        Source("stdlib", options.rows, options.length, seed=options.seed + 1),
        tokenizer,
        held_out=2 * JUDGED,
    )
    recipe = Recipe(options.steps, **{**json.loads(options.recipe), "seed": options.seed})
    start, worked = time.perf_counter(), time.process_time()
    with Output().progress() as stages, stages.stage("heal"):
        result = healed(student, teacher, learned, recipe)
    spent = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
    }
    row = {**_row(result, learned, options), **spent}
    for name, value in row.items():
        print(f"{name:18} {value}")
    for look in result.looks:
        print(f"  {look['stage']:8} step {look['step']:5}  excess {look['excess']:+.4f}")
    if not options.dry:
        write("healing", [row])
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--rewrite", default="dha", help="the pass that makes the student")
    parser.add_argument("--config", default='{"kv_heads": 2}', help="its setting, as JSON")
    parser.add_argument("--student", type=Path, help="a saved artifact instead")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--recipe", default=RECIPE, help="settings of heal, as JSON")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def _student(teacher: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    if options.student is not None:
        return attnopt.capture(options.student)
    stats = attnopt.calibrate(teacher, split_of(Source("stdlib", 48, options.length), tokenizer))
    config = json.loads(options.config)
    choices = tuple(Choice(s.name, options.rewrite, config) for s in teacher.sites)
    return attnopt.apply(teacher, attnopt.Plan(choices, statistics=stats))


def _row(result: Healing, rows: Split, options: argparse.Namespace) -> dict[str, Any]:
    before, after = result.before.delta_nll, result.after.delta_nll
    made = str(options.student or f"{options.rewrite} {options.config}")
    return {
        "student": made,
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
        "recipe": json.loads(options.recipe),
        "seed": options.seed,
    }


if __name__ == "__main__":
    sys.exit(main())
