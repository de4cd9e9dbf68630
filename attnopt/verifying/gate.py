"""The gate: both programs on the same held-out rows, scored by what they are for."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from attnopt.data import batches_of, held_out_of
from attnopt.verifying import classes, embedding, language
from attnopt.verifying.calling import Call, Run, ready
from attnopt.verifying.harness import Benchmarks, benchmarks, check_harness
from attnopt.verifying.report import Report, Scores
from attnopt.verifying.sites import site_errors
from attnopt.verifying.tasks import checked_task, objective_of, special_tokens, task_of


def verify(
    program: Any,
    reference: Any,
    data: Any = None,
    *,
    max_drop: float | None = None,
    task: str | None = None,
    tasks: Sequence[str] = (),
    seed: int = 0,
) -> Report:
    """Compare a program with its reference, row by row, on held-out data.

    Both are Programs, which compute in float32, or modules. Of a source or a Split the held-out
    half is taken; rows and calls are taken whole. `task` is lm (the drop is the relative rise of
    the loss), embedding (1 - cosine) or classification (the fall of the accuracy, or without labels
    the share of other answers); without it, it is told from the result. `tasks` of
    lm-evaluation-harness are run and not judged.
    """
    checked_task(task)
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop {max_drop!r} must be a finite number, and not negative")
    if tasks:
        check_harness()
    held, source, notes = held_out_of(reference, data)
    calls = list(batches_of(reference, held, labels=True))
    if not calls:
        raise ValueError("there are no held-out rows: a generator may have been read before")
    with ExitStack() as stack:
        before, after = (stack.enter_context(ready(x)) for x in (reference, program))
        named = task or task_of(before, calls[0])
        scores = _scores(named, after, before, calls, seed)
        found = _benchmarks(after, before, reference, tasks)
    errors = site_errors(program, reference, calls[0])
    return Report(scores, max_drop, source, (*notes, *_notes(scores)), errors, found)


def _scores(task: str, after: Run, before: Run, calls: Sequence[Call], seed: int) -> Scores:
    if task == "embedding":
        return embedding.score(after, before, calls, seed=seed)
    if task == "classification":
        return classes.score(after, before, calls, seed=seed)
    objective = objective_of(before, calls[0])
    hidden = _mask_token(before) if objective == "masked" else None
    start = special_tokens(getattr(before, "config", None))
    return language.score(
        after, before, calls, objective=objective, mask_token=hidden, start_token=start, seed=seed
    )


def _mask_token(run: Run) -> int | None:
    """Return the token that hides others, where the model's tokenizer has one."""
    from attnopt.data.reading import folder_of, tokenizer_of

    named = getattr(getattr(run, "config", None), "mask_token_id", None)
    if isinstance(named, int) or folder_of(run) is None:
        return named
    try:
        found = tokenizer_of(run).mask_token_id
    except ValueError:
        return None
    return found if isinstance(found, int) else None


def _benchmarks(after: Run, before: Run, reference: Any, tasks: Sequence[str]) -> Benchmarks:
    if not tasks:
        return {}
    from attnopt.data.reading import tokenizer_of

    return benchmarks(after, before, tokenizer_of(reference), tasks)


def _notes(scores: Scores) -> Iterator[str]:
    """Say what a reader has to know of the rows."""
    bounds = scores.drop.ci95
    if any(math.isinf(x) for x in bounds):
        yield "no interval: fewer than two rows, or results that are no numbers"
