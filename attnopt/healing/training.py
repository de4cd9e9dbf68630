"""The loop: steps, looks at the watched rows, checkpoints, and when to stop."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import debug
from attnopt.healing import checkpoints
from attnopt.healing.checkpoints import Progress
from attnopt.healing.functional import Functional
from attnopt.healing.interrupts import Interrupted, deferred
from attnopt.healing.learner import Learner
from attnopt.healing.objectives import continues_text, distance, divergence, surprise
from attnopt.healing.pace import Pace
from attnopt.healing.recipe import Recipe
from attnopt.healing.regions import Cut
from attnopt.healing.rows import Batch, Deal, Rows, chunks, taken
from attnopt.healing.workers import Workers
from attnopt.program import Program
from attnopt.verifying import Paired

Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Stage:
    """A stretch of steps that minimises one thing."""

    name: str
    steps: int
    lr: float
    leaves: Mapping[str, Tensor]
    loss: Loss

    def rate(self, step: int, recipe: Recipe) -> float:
        """Return the learning rate of a step: a linear rise, then a cosine."""
        rise = max(round(self.steps * recipe.warmup), 1)
        if step < rise:
            return self.lr * (step + 1) / rise
        part = (step - rise) / max(self.steps - rise, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * part))
        return self.lr * (recipe.floor + (1 - recipe.floor) * cosine)


@dataclass(frozen=True)
class Task:
    """A student, its teacher, their rows, and what is done with them.

    `added` names the weights that the teacher does not have.
    """

    recipe: Recipe
    rows: Rows
    student: Functional
    teacher: Functional
    learner: Learner
    known: Mapping[str, Tensor] = field(repr=False)
    program: Program
    workers: Workers
    cut: Cut | None = None
    pace: Pace = field(default_factory=Pace)
    added: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.recipe.device)

    def stages(self) -> tuple[Stage, ...]:
        """Return both stages: site by site, where there are sites to compare, then end to end."""
        recipe = self.recipe
        first = recipe.first_steps if self.cut is not None and self.cut.regions else 0
        stages: list[Stage] = []
        if self.cut is not None and first:
            names = [p for r in self.cut.regions for p in r.parameters]
            leaves = self.learner.leaves_of(names)
            stages.append(Stage("sites", first, recipe.site_lr, leaves, self._site_loss(self.cut)))
        rest = recipe.steps - first
        if rest:
            last = Stage("distil", rest, recipe.lr, self.learner.leaves, self._whole_loss)
            stages.append(last)
        return tuple(stages)

    def row_losses(
        self, run: Functional, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss of each row: that of the next token, else the distance to the teacher."""
        count = len(next(iter(rows.values())))
        found = torch.zeros(count, dtype=torch.float64)
        parts = list(chunks(rows))
        with torch.no_grad():
            for index in parts[self.workers.rank :: self.workers.count]:
                batch = taken(rows, index, self.device)
                logits = run.logits(batch, weights)
                if continues_text(logits, batch):
                    lost = surprise(logits, batch)
                else:
                    lost = divergence(logits, self.teacher.logits(batch, self.known), batch)
                found[index] = lost.double().cpu()
        return self.workers.total(found)

    def kept_weights(self) -> dict[str, Tensor]:
        """Return every weight as it would be stored now."""
        made = self.learner.changed_weights(self.program)
        wide = {name: x.to(self.device, torch.float32) for name, x in made.items()}
        return {**self.learner.frozen, **wide}

    def _site_loss(self, cut: Cut) -> Loss:
        student = Functional.of(cut.student, self.device, self.pace)
        teacher = Functional.of(cut.teacher, self.device)

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                values = teacher.flat(batch, self.known)
            given = dict(zip(cut.inputs, values, strict=False))
            ours = student.flat(batch, self.learner.weights(), given)
            return distance(ours, values[len(cut.inputs) :], batch)

        return loss

    def _whole_loss(self, batch: Batch) -> Tensor:
        recipe = self.recipe
        with torch.no_grad():
            theirs = self.teacher.logits(batch, self.known)
        ours = self.student.logits(batch, self.learner.weights())
        found = divergence(
            ours, theirs, batch, top_k=recipe.top_k, temperature=recipe.temperature
        ).mean()
        if recipe.lm_weight and continues_text(ours, batch):
            found = found + recipe.lm_weight * surprise(ours, batch).mean()
        return found


@dataclass
class Run:
    """A task under way: its progress, the optimizer of the present stage, the best weights."""

    task: Task
    identity: Mapping[str, Any]
    place: Path | None = None
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.AdamW | None = None
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))

    def go(self) -> None:
        """Take every step that is left, from wherever the run is."""
        task, progress = self.task, self.progress
        self.reference = task.row_losses(task.teacher, task.known, task.rows.watched)
        if not progress.looks:
            self._look("start")
        if not progress.stopped:
            self._take_stages(task.stages())
        progress.stopped = progress.stopped or "all steps were taken"
        task.learner.set(self.best)
        self.save()

    def _take_stages(self, stages: Sequence[Stage]) -> None:
        progress = self.progress
        with deferred() as pressed:
            for number in range(progress.stage, len(stages)):
                self._prepare(stages[number])
                for _ in self._steps(stages[number]):
                    if self.task.workers.any(pressed()):
                        self._leave()
                if progress.stopped:
                    return
                progress.stage, progress.step, self.optimizer = number + 1, 0, None

    def resume(self) -> None:
        """Continue from what is on disk."""
        assert self.place is not None
        self.progress, tensors = checkpoints.read(self.place, self.identity)
        parts: dict[str, dict[str, Tensor]] = {"leaf": {}, "best": {}, "mean": {}, "square": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.task.learner.set(parts["leaf"])
        device = self.task.device
        self.best = {name: x.to(device) for name, x in parts["best"].items()}
        stages = self.task.stages()
        if parts["mean"] and self.progress.stage < len(stages):
            stage = stages[self.progress.stage]
            self.optimizer = self._made(stage)
            for name in parts["mean"]:
                leaf = stage.leaves[name]
                self.optimizer.state[leaf] = {
                    "step": torch.tensor(float(self.progress.step)),
                    "exp_avg": parts["mean"][name].to(device),
                    "exp_avg_sq": parts["square"][name].to(device),
                }

    def save(self) -> None:
        """Put the run on disk."""
        if self.place is not None and self.task.workers.leads:
            checkpoints.write(self.place, self.progress, self._tensors(), self.identity)
        self.task.workers.wait()

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"leaf/{n}": x for n, x in self.task.learner.leaves.items()}
        found |= {f"best/{n}": x for n, x in self.best.items()}
        if self.optimizer is not None:
            for name, leaf in self.task.learner.leaves.items():
                state = self.optimizer.state.get(leaf)
                if state:
                    found[f"mean/{name}"] = state["exp_avg"]
                    found[f"square/{name}"] = state["exp_avg_sq"]
        return found

    def _prepare(self, stage: Stage) -> None:
        if self.optimizer is None:
            self.optimizer = self._made(stage)

    def _made(self, stage: Stage) -> torch.optim.AdamW:
        recipe, added = self.task.recipe, self.task.learner.leaves_of(self.task.added)
        groups = [
            {"params": [x for n, x in stage.leaves.items() if (n in added) is new], "haste": haste}
            for new, haste in ((False, 1.0), (True, recipe.haste))
        ]
        return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=recipe.weight_decay)

    def _steps(self, stage: Stage) -> Iterator[None]:
        """Take the steps of a stage; yield after each."""
        progress, recipe = self.progress, self.task.recipe
        for step in range(progress.step, stage.steps):
            lost = self._step(stage, step)
            progress.step = step + 1
            progress.losses[stage.name != "sites"].append(lost)
            debug.advance(stage.name, progress.step, stage.steps)
            if not math.isfinite(lost):
                progress.stopped = f"the loss became {lost} in step {progress.steps}"
                return
            if progress.step % recipe.every == 0 or progress.step == stage.steps:
                self._look(stage.name)
                if progress.stopped:
                    return
                self.save()
            yield

    def _step(self, stage: Stage, step: int) -> float:
        task, recipe = self.task, self.task.recipe
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=task.device)
        for batch in self._batches():
            with (
                torch.autocast(
                    task.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"
                ),
                task.pace.at(recipe.strength(self.progress.steps)),
            ):
                loss = (stage.loss(batch) + task.pace.added()) / recipe.accumulate
            loss.backward()
            total += loss.detach()
        leaves = [x for x in stage.leaves.values() if x.grad is not None]
        task.workers.average([*(x.grad for x in leaves if x.grad is not None), total])
        torch.nn.utils.clip_grad_norm_(leaves, recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(step, recipe) * group["haste"]
        if math.isfinite(float(total)):
            self.optimizer.step()
        return float(total)

    def _batches(self) -> Iterator[Batch]:
        """Yield this process's share of the rows of a step, and count all of them."""
        task, progress, recipe = self.task, self.progress, self.task.recipe
        learned = task.rows.learned
        deal = Deal(len(next(iter(learned.values()))), recipe.seed)
        together = recipe.batch * task.workers.count
        for _ in range(recipe.accumulate):
            start = progress.rows + task.workers.rank * recipe.batch
            index = deal.between(start, start + recipe.batch)
            progress.rows += together
            ids = learned.get("input_ids")
            progress.tokens += together * (1 if ids is None else ids.shape[1])
            yield taken(learned, index, task.device)

    def _look(self, stage: str) -> None:
        """Measure the watched rows, keep the weights if they are the best, and decide to stop."""
        task, progress = self.task, self.progress
        losses = task.row_losses(task.student, task.kept_weights(), task.rows.watched)
        mean, base = float(losses.mean()), float(self.reference.mean())
        relative = Paired.of((losses - self.reference) / base) if base else None
        progress.looks.append(
            {
                "stage": stage,
                "step": progress.steps,
                "tokens": progress.tokens,
                "loss": mean,
                "excess": mean - base,
            }
        )
        if mean < progress.best:
            progress.best, progress.best_at, progress.stale = mean, progress.steps, 0
            self.best = task.learner.copy()
        elif stage == "distil":
            progress.stale += 1
        limit = task.recipe.max_drop
        if limit is not None and relative is not None and relative.ci95[1] <= limit:
            progress.stopped = "the gate was met on the watched rows"
        elif progress.stale >= task.recipe.patience:
            progress.stopped = f"{progress.stale} looks in a row saw no better weights"

    def _leave(self) -> None:
        self.save()
        done, total = self.progress.steps, sum(s.steps for s in self.task.stages())
        where = "" if self.place is None else f"; {self.place} resumes it"
        raise Interrupted(f"interrupted after step {done} of {total}{where}")


def identity(recipe: Recipe, rows: Rows, learner: Learner, workers: Workers) -> dict[str, Any]:
    """Say what a run is of: it is resumed with the same, bit for bit."""
    whole = hashlib.sha256()
    for name, leaf in sorted(learner.leaves.items()):
        whole.update(f"{name}{tuple(leaf.shape)}".encode())
        whole.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "recipe": asdict(recipe),
        "data": rows.digest,
        "weights": whole.hexdigest(),
        "processes": workers.count,
    }
