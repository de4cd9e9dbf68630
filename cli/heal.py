"""Give a rewritten model back what the rewrite lost, by distillation from its source.

attnopt heal out --teacher examples/models/code-llama -o healed --steps 400 --max-drop 5%

First every rewritten attention learns to give what the teacher's gives, then the whole learns the
teacher's distribution. Half of the held-out rows say when to stop and which step's weights are
kept; the other half judges. torchrun -m attnopt heal ... shares the work between processes.

Exit status: 0 accepted, 2 usage, 3 nothing was gained, 4 the quality gate failed (the best
candidate is kept as OUT.rejected), 5 refused for safety, 6 resources, 130 interrupted (--resume
goes on where it stopped).
"""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result
    from attnopt.data import Source
    from attnopt.healing import Healing, Recipe
    from attnopt.nouns import Plan
    from attnopt.program import Program

DATA = "stdlib:4096x256"
_ROWS = 4096
# Settings of attnopt.healing.Recipe by flag: their type, and what they are.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "site-steps": (int, "how many of the steps go site by site (default: a quarter)"),
    "lr": (float, "learning rate end to end"),
    "site-lr": (float, "learning rate site by site"),
    "batch": (int, "rows of a process in one pass"),
    "accumulate": (int, "passes a step"),
    "train": (str, "the weights that learn: changed (by the rewrite), sites or all"),
    "rank": (int, "learn a low-rank change of this rank, merged at the end"),
    "alpha": (float, "scale of the low-rank change, divided by the rank"),
    "top-k": (int, "distil the teacher's likeliest tokens only"),
    "temperature": (float, "divide the logits of both"),
    "lm-weight": (float, "weight of the loss on the text itself"),
    "anneal": (float, "share of the steps in which annealed ops come to full strength"),
    "clip": (float, "largest norm of a gradient"),
    "weight-decay": (float, "decay of the weights that learn"),
    "dtype": (str, "float32, or bfloat16 for autocast"),
    "device": (str, "where to run, such as cuda"),
    "every": (int, "steps between two looks at the watched rows, and two checkpoints"),
    "patience": (int, "looks without gain before it stops"),
    "seed": (int, "order of the rows"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the teacher, the data, the settings and the place of the result."""
    _source.configure(parser)
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="the source of MODEL")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, required=True, help="how many steps, of both stages")
    parser.add_argument(
        "--data",
        metavar="NAME[:ROWSxTOKENS]",
        default=DATA,
        help="text to learn from and to judge by: stdlib (Python's own library), a file, a "
        f"folder, or a .safetensors of input_ids (default {DATA})",
    )
    parser.add_argument(
        "--held-out", metavar="ROWS", type=int, default=192, help="held-out rows (default 192)"
    )
    parser.add_argument(
        "--max-drop",
        metavar="SHARE",
        help="stop when the held-out loss is at most so far above the teacher's, such as 1%%; the "
        "upper bound of its 95 %% confidence interval is compared",
    )
    for name, (kind, what) in _SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind, help=what)
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="where the run is kept (default OUT.healing)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Heal, print the summary, and say with the status whether the gate was passed."""
    student, teacher = _models(arguments)
    recipe, data = _checked(arguments)
    with output.progress() as stages, stages.stage("heal"):
        found = _healed(arguments, (student, teacher), recipe, data)
    if found is None:
        return Exit.ACCEPTED
    result, healing, place = found
    if output.json:
        output.document("attnopt.heal/1", _document(result, place))
    else:
        _summary(output, result, healing, place)
    return Exit.ACCEPTED if result.accepted else Exit.GATE


def _models(arguments: argparse.Namespace) -> tuple[_source.Source, _source.Source]:
    named = argparse.Namespace(**{**vars(arguments), "model": arguments.teacher})
    return _source.resolve(arguments), _source.resolve(named)


def _checked(arguments: argparse.Namespace) -> "tuple[Recipe, Source]":
    """Return the recipe and the data; whatever is wrong with them is told before any work."""
    from attnopt.artifacts.saving import refuse_foreign
    from attnopt.data import Source, readable
    from attnopt.healing import Recipe, check_checkpoint
    from attnopt.planning import checked_goal

    flags = [name.replace("-", "_") for name in _SETTINGS]
    given = {n: getattr(arguments, n) for n in flags if getattr(arguments, n) is not None}
    if arguments.held_out < 4:
        raise CommandError("AO121", "--held-out needs at least 4 rows: two to watch, two to judge")
    try:
        goal = {} if arguments.max_drop is None else {"max_drop": arguments.max_drop}
        recipe = Recipe.of(arguments.steps, {**given, **checked_goal(goal)})
        data = readable(Source.parse(arguments.data, seed=recipe.seed))
        refuse_foreign(Path(arguments.out).absolute())
        check_checkpoint(_checkpoint(arguments), resume=arguments.resume)
    except (ValueError, TypeError) as error:
        raise CommandError("AO121", str(error)) from error
    sized = str(data) == arguments.data
    return recipe, data if sized else replace(data, rows=_ROWS)


def _checkpoint(arguments: argparse.Namespace) -> Path:
    if arguments.checkpoint is not None:
        return Path(arguments.checkpoint).absolute()
    out = Path(arguments.out).absolute()
    return out.with_name(f"{out.name}.healing")


def _healed(
    arguments: argparse.Namespace,
    models: tuple[_source.Source, _source.Source],
    recipe: "Recipe",
    data: "Source",
) -> "tuple[Result, Healing, Path] | None":
    """Heal and save; None in the processes that only help."""
    import attnopt
    from attnopt.artifacts.saving import Result, refuse_foreign, save
    from attnopt.data import split_of
    from attnopt.healing import Interrupted, healed, remove_checkpoint
    from attnopt.optimizing import measure, target, tokenizer_of

    student, teacher = (attnopt.apply(_source.capture(m), "exact") for m in models)
    kept = _checkpoint(arguments)
    with told(arguments.out, "AO122"), _source.quiet_libraries():
        for program in (student, teacher):
            refuse_foreign(Path(arguments.out).absolute(), program)
        split = split_of(
            data, tokenizer_of(teacher) if data.is_text else None, held_out=arguments.held_out
        )
        try:
            made = healed(student, teacher, split, recipe, checkpoint=kept, resume=arguments.resume)
        except Interrupted as error:
            raise CommandError(
                "AO130", f"{error}: run the same command with --resume", Exit.INTERRUPTED
            ) from error
        if not made.leads:
            return None
        _must_gain(made, kept)
        measured = measure(made.program, teacher, split.held_out)
        result = Result(
            made.program,
            teacher,
            _plan(models[0].text, student),
            made.after,
            {**measured, "healing": made.content()},
            _command(arguments),
        )
        place = save(result, target(arguments.out, result))
        remove_checkpoint(kept)
    return result, made, place


def _must_gain(made: "Healing", kept: Path) -> None:
    """Refuse a run that changed nothing: the result would be the student again."""
    from attnopt.healing import remove_checkpoint

    if made.best_at:
        return
    remove_checkpoint(kept)
    why = (
        "the student passes the gate as it is"
        if not made.steps
        else f"none of {made.steps} steps made the watched loss less; try another --lr, or more "
        "--data"
    )
    raise CommandError("AO204", f"nothing was healed: {why}", Exit.NOTHING)


def _plan(student: str, program: "Program") -> "Plan":
    """Return the plan of the student's artifact with its statistics; empty where there is none."""
    from attnopt.calibrating import Statistics
    from attnopt.nouns import Plan

    place = Path(student) / "attnopt" / "plan.yaml"
    if not place.is_file():
        return Plan(())
    plan = Plan.load(place)
    if plan.source is None:
        return plan
    return replace(plan, statistics=Statistics.load(plan.source, program.weights))


def _command(arguments: argparse.Namespace) -> str:
    """Return the command that makes the same again."""
    words = ["attnopt", "heal", arguments.model, "--teacher", arguments.teacher]
    words += ["-o", arguments.out, "--steps", str(arguments.steps), "--data", arguments.data]
    words += ["--held-out", str(arguments.held_out)]
    for name in ("max-drop", *_SETTINGS):
        value = getattr(arguments, name.replace("-", "_"))
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def _document(result: "Result", place: Path) -> dict[str, Any]:
    from attnopt.artifacts.saving import report_of

    content = {k: v for k, v in report_of(result).items() if k != "schema"}
    return {**content, "out": str(place), "tier": _tier(result)}


def _tier(result: "Result") -> int:
    return int((result.measured or {}).get("tier", result.program.tier))


def _summary(output: Output, result: "Result", healing: "Healing", place: Path) -> None:
    before, after = healing.before, healing.after
    output.line(
        f"{result.program.name}: {healing.steps} steps on {healing.tokens:,} tokens, "
        f"{healing.learned:,} weights learnt; {healing.stopped}; kept those of step "
        f"{healing.best_at}"
    )
    output.line()
    rows = [
        ("teacher", f"{before.base:.4f}", ""),
        ("before", f"{float(before.nll.mean()):.4f}", f"{before.delta_nll.mean:+.4f}"),
        ("healed", f"{float(after.nll.mean()):.4f}", f"{after.delta_nll.mean:+.4f}"),
    ]
    output.table(("", "held-out loss, nats a token", "above the teacher"), rows, foldable={""})
    output.line()
    for refusal in healing.skipped:
        output.line(f"not compared site by site: {refusal}")
    output.line(after.verdict)
    if not after.accepted:
        output.line("more --steps, or more --data, may come closer to the teacher")
    output.line(f"saved as {shown(place)} (tier {_tier(result)})")
