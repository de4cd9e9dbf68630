"""Tasks of lm-evaluation-harness, run on both programs: told beside the gate, not judged by it.

The harness fetches its data itself. https://github.com/EleutherAI/lm-evaluation-harness
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.verifying.calling import Run

Benchmarks = dict[str, dict[str, tuple[float, float]]]


def check_harness() -> None:
    """Raise ValueError where the harness is not installed."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise ValueError(
            "tasks of lm-evaluation-harness need it: pip install 'attnopt[lm-eval]'"
        ) from error


def benchmarks(program: Run, reference: Run, tokenizer: Any, tasks: Sequence[str]) -> Benchmarks:
    """Return, for each task and metric, what the reference and the program score."""
    check_harness()
    before = _scores(reference, tokenizer, tasks)
    after = _scores(program, tokenizer, tasks)
    return {
        task: {m: (x, after[task][m]) for m, x in found.items() if m in after.get(task, {})}
        for task, found in before.items()
    }


def _scores(model: Run, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    lm_eval: Any = importlib.import_module("lm_eval")
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer)
    try:
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks))
    except KeyError as error:
        raise ValueError(f"lm-evaluation-harness knows no task {error}") from error
    return {str(task): _numbers(values) for task, values in found["results"].items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task, which the harness names as `acc,none`."""
    return {
        str(name).removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name not in {"alias", "sample_len"}
    }
