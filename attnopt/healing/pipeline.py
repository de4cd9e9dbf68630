"""Healing, one line a stage: what differs, the sites one by one, the whole, and what it brought."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.branches import Branches, branches, has_branches
from attnopt.frontend import capture
from attnopt.healing import checkpoints
from attnopt.healing.functional import Functional, wide_weights
from attnopt.healing.learner import Learner, added, changed, moving
from attnopt.healing.pace import Pace
from attnopt.healing.recipe import Recipe
from attnopt.healing.regions import Cut, cut, regions_of
from attnopt.healing.rows import Rows, rows_of
from attnopt.healing.training import Run, Task, identity
from attnopt.healing.workers import Workers, joined
from attnopt.program import Program
from attnopt.rings import with_rings
from attnopt.verifying import Report
from attnopt.verifying.language import LanguageScores

Teacher = Program | nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Healing:
    """A healed program, what was measured before and after, and how the run went.

    `before` and `after` compare with the teacher on rows that nothing was chosen by. `looks` are
    the losses of the watched rows, the first at step 0; `losses` are those of the steps, by stage.
    """

    program: Program
    before: Report
    after: Report
    looks: Sequence[Mapping[str, Any]]
    losses: Mapping[str, Sequence[float]]
    steps: int
    tokens: int
    best_at: int
    stopped: str
    learned: int
    skipped: tuple[str, ...] = ()
    leads: bool = True
    linear: Branches | None = None

    @property
    def left(self) -> float:
        """The share of the excess loss that is left."""
        return self.after.delta_nll.mean / self.before.delta_nll.mean

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        linear = {} if self.linear is None else {"linear": self.linear.content()}
        return {
            **linear,
            "before": self.before.content(),
            "after": self.after.content(),
            "looks": [dict(look) for look in self.looks],
            "stages": {
                name: {"steps": len(x), "first": x[0], "last": x[-1]}
                for name, x in self.losses.items()
                if x
            },
            "steps": self.steps,
            "tokens": self.tokens,
            "kept_from_step": self.best_at,
            "stopped": self.stopped,
            "parameters_learned": self.learned,
            "skipped": list(self.skipped),
        }


def heal(
    program: Program,
    teacher: Teacher,
    data: Any,
    *,
    steps: int,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> Program:
    """Return the program with weights distilled from its teacher; the old one is untouched.

    `settings` are those of `attnopt.healing.Recipe`, such as lr, batch, rank and max_drop. With a
    `checkpoint` directory the run can be resumed after an interruption, bit for bit.
    """
    recipe = Recipe.of(steps, settings)
    return healed(program, teacher, data, recipe, checkpoint=checkpoint, resume=resume).program


def healed(
    program: Program,
    teacher: Teacher,
    data: Any,
    recipe: Recipe,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Healing:
    """Heal as `heal` does, and return what was measured, too."""
    rings, program = program.grown is not None, program.growing
    reference = _teacher(teacher)
    _refuse_parts(program, reference)
    place = None if checkpoint is None else Path(checkpoint).absolute()
    checkpoints.check(place, resume=resume)
    rows = rows_of(data, lambda: _tokenizer(reference))
    with joined() as workers:
        task = _task(program, reference, rows, recipe, workers)
        run = Run(task, identity(recipe, rows, task.learner, workers), place)
        before = task.row_losses(task.student, task.kept_weights(), rows.judged)
        if resume:
            run.resume()
        run.go()
        result = program.with_weights(task.learner.changed_weights(program))
        found = _measured(run, result, before)
        return replace(found, program=with_rings(found.program)) if rings else found


def _task(program: Program, teacher: Program, rows: Rows, recipe: Recipe, workers: Workers) -> Task:
    device = torch.device(recipe.device)
    names = moving(program, teacher, recipe)
    pace = Pace()
    return Task(
        recipe,
        rows,
        Functional.of(program, device, pace),
        Functional.of(teacher, device),
        Learner.of(program, wide_weights(program, device), names, recipe),
        wide_weights(teacher, device),
        program,
        workers,
        _cut(program, teacher, names),
        pace,
        added(program, teacher),
    )


def _cut(program: Program, teacher: Program, names: frozenset[str]) -> Cut | None:
    """Cut both programs at what the rewrite changed; None where it changed no region."""
    differing = {name for name in names if changed(program, teacher, name)}
    regions = regions_of(program, differing, teacher)
    return cut(program, teacher, regions) if regions else None


def _measured(run: Run, result: Program, before: Tensor) -> Healing:
    task, progress = run.task, run.progress
    judged = task.rows.judged
    base = task.row_losses(task.teacher, task.known, judged)
    after = task.row_losses(task.student, task.kept_weights(), judged)
    counts, limit = _scored(judged), task.recipe.max_drop
    lost, left = (Report(LanguageScores(base, losses, counts), limit) for losses in (before, after))
    note = (
        f"heal: {progress.steps} steps, {progress.tokens} tokens, "
        f"loss {lost.nll.mean():.4f} to {left.nll.mean():.4f} (teacher {left.base:.4f})"
    )
    linear = branches(result, judged["input_ids"]) if _reads_far(result, judged) else None
    notes = () if linear is None else linear.told
    return Healing(
        replace(result, history=(*result.history, note, *notes)),
        lost,
        left,
        looks=progress.looks,
        losses={"sites": progress.losses[0], "distil": progress.losses[1]},
        steps=progress.steps,
        tokens=progress.tokens,
        best_at=progress.best_at,
        stopped=progress.stopped,
        learned=sum(x.numel() for x in task.learner.leaves.values()),
        skipped=() if task.cut is None else tuple(map(str, task.cut.skipped)),
        leads=task.workers.leads,
        linear=linear,
    )


def _reads_far(program: Program, rows: Mapping[str, Tensor]) -> bool:
    """Tell whether there is linear attention over texts."""
    return "input_ids" in rows and bool(program.states) and has_branches(program)


def _scored(rows: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of each row are predicted; one where rows have none."""
    ids, mask = rows.get("input_ids"), rows.get("attention_mask")
    if ids is None:
        return torch.ones(len(next(iter(rows.values()))))
    if mask is not None and mask.shape == ids.shape:
        return mask[:, 1:].sum(1).clamp_min(1)
    return torch.full((len(ids),), ids.shape[1] - 1)


def _teacher(teacher: Teacher) -> Program:
    return teacher if isinstance(teacher, Program) else capture(teacher)


def _tokenizer(program: Program) -> Any:
    from attnopt.optimizing import tokenizer_of

    return tokenizer_of(program)


def _refuse_parts(*programs: Program) -> None:
    for program in programs:
        if program.parts:
            raise NotImplementedError(
                f"cannot heal {program.name}: it was captured in parts "
                f"({', '.join(program.parts)}), and healing runs one graph so far"
            )
