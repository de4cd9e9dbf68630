"""Rewrite a checkpoint to meet a goal, prove what it costs, and save it.

attnopt optimize examples/models/code-llama -o out --kv-cache 50% --max-drop 10%

Exit status: 0 accepted, 2 usage, 3 nothing to do, 4 the quality gate failed (the best candidate is
kept as OUT.rejected), 5 refused for safety, 6 resources, 130 interrupted (OUT is what it was, and
the same command goes on where it stopped).
"""

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source, _trial, _wanted
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result
    from attnopt.recipes import Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the goal, the data and the place of the result."""
    _source.configure(parser)
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the result goes")
    _wanted.configure(parser)
    parser.add_argument("--plan", metavar="FILE", help="carry out a plan.yaml instead of searching")
    parser.add_argument(
        "--test",
        action="store_true",
        help="run everything on a random twin of two layers in a temporary directory, in less than "
        "a minute, and leave OUT alone",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Optimize, print the summary, and say with the status whether the gate was passed."""
    _one_goal(arguments)
    recipe = _wanted.wanted(arguments, planned=arguments.plan is not None)
    source = _source.resolve(arguments)
    if arguments.test:
        return _trial.run(arguments, output, source, recipe)
    left = f"{arguments.out} is what it was before"
    with (
        _wanted.interruptible(arguments, left),
        output.progress() as stages,
        stages.stage("optimize"),
    ):
        result = _optimize(arguments, source, recipe)
    place = _place(arguments, result)
    if output.json:
        output.document("attnopt.optimize/1", _document(result, place))
    else:
        _summary(output, result, place)
        if not result.accepted and arguments.plan is None and result.plan.search is None:
            output.line(_MIXED)
    return Exit.ACCEPTED if result.accepted else Exit.GATE


_MIXED = (
    "all layers were treated alike here; --tier 2 measures every pass at every site and takes\n"
    "the best mixture, which mostly loses less"
)


def _one_goal(arguments: argparse.Namespace) -> None:
    """Refuse a plan beside a goal: a plan has its own."""
    named = [n for n in (*_wanted.BUDGETS, "recipe") if getattr(arguments, n) is not None]
    if arguments.plan is not None and named:
        flag = f"--{named[0].replace('_', '-')}"
        raise CommandError("AO111", f"{flag} and --plan exclude each other: one at a time")


def _optimize(arguments: argparse.Namespace, source: _source.Source, recipe: "Recipe") -> "Result":
    from attnopt import passes as registry
    from attnopt.artifacts.saving import refuse_foreign
    from attnopt.data import Source, readable
    from attnopt.estimating import TooLargeError
    from attnopt.nouns import Plan
    from attnopt.optimizing import optimize
    from attnopt.planning import NothingToDoError
    from attnopt.recipes import recipe_text

    try:
        refuse_foreign(Path(arguments.out).absolute())
        for name in recipe.passes:
            registry.load(name)
        data = readable(Source.parse(recipe.data, seed=recipe.seed), own=source.is_own)
        plan = None if arguments.plan is None else Plan.load(arguments.plan)
    except ValueError as error:
        raise CommandError("AO112", str(error)) from error
    goal = {**plan.goal, **recipe.goal} if plan is not None else recipe.goal
    program = _source.capture(source)
    with told(arguments.out, "AO113"), _source.quiet_libraries():
        try:
            return optimize(
                program,
                goal,
                plan,
                data,
                arguments.out,
                held_out=recipe.held_out,
                tier=recipe.tier,
                command=_command(arguments, recipe),
                passes=recipe.passes or None,
                rules=recipe.rules,
                tensor_parallel=recipe.tensor_parallel,
                tokens=recipe.tokens,
                work=_wanted.work_of(arguments, arguments.out),
                recipe=recipe_text(recipe) if plan is None else "",
            )
        except NothingToDoError as error:
            raise CommandError("AO201", str(error), Exit.NOTHING) from error
        except TooLargeError as error:
            raise CommandError("AO603", str(error), Exit.RESOURCES) from error


def _command(arguments: argparse.Namespace, recipe: "Recipe") -> str:
    """Return the command that makes the same again."""
    words = ["attnopt", "optimize", arguments.model, "-o", arguments.out]
    words += _wanted.words(arguments, "plan")
    words += ["--data", recipe.data, "--held-out", str(recipe.held_out)]
    words += ["--seed", str(recipe.seed)]
    return shlex.join(words)


def _place(arguments: argparse.Namespace, result: "Result") -> Path:
    from attnopt.optimizing import target

    return target(arguments.out, result)


def _document(result: "Result", place: Path) -> dict[str, Any]:
    from attnopt.artifacts.saving import report_of

    content = report_of(result, place)
    kept = {k: v for k, v in content.items() if k != "schema"}
    return {**kept, "out": str(place), "tier": _tier(result)}


def _tier(result: "Result") -> int:
    return int((result.measured or {}).get("tier", 0))


_LOADS = (
    "plain Transformers loads it, without attnopt",
    "plain Transformers loads it after `import attnopt`",
    "it is a program: Transformers' Auto classes load it after `import attnopt`",
)


def _summary(output: Output, result: "Result", place: Path) -> None:
    passes = ", ".join(sorted({c.rewrite for c in result.plan.choices})) or "exact"
    changed = {c.site for c in result.plan.choices}
    reference = result.reference.main
    told = f"{_share(reference.sites, changed)} attentions"
    if any(m.name in changed for m in reference.mlps):
        told += f" and {_share(reference.mlps, changed)} MLPs"
    output.line(f"{result.program.name}: {told} rewritten ({passes})")
    output.line()
    rows = [*_cost_rows(result), *_quality_rows(result)]
    output.table(("", "before", "after", "change"), rows, foldable={""})
    output.line()
    if result.report is not None:
        output.line(_verdict(result))
    tier = _tier(result)
    output.line(f"saved as {shown(place)} (tier {tier}): {_LOADS[tier]}")
    if tier == 2 and "stock" in (result.measured or {}):
        output.note(f"no stock checkpoint: {(result.measured or {})['stock']}")
    loader = f"{stock_name(place, result)}.from_pretrained" if tier < 2 else "attnopt.load"
    output.line(f'  {loader}("{shown(place)}")')
    output.note(f"the whole report: {shown(place / 'attnopt' / 'report.html')}")


def stock_name(place: Path, result: "Result") -> str:
    """Return the class that an artifact is to be loaded as."""
    told = json.loads((place / "config.json").read_text(encoding="utf-8")).get("architectures")
    return str(told[0]) if told else result.program.name


def _share(things: Any, changed: set[str]) -> str:
    return f"{sum(t.name in changed for t in things)} of {len(things)}"


def _cost_rows(result: "Result") -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    measured = result.measured or {}
    if "kv_bytes_per_token" in measured:
        before, after = measured["kv_bytes_per_token"]
        rows.append(_row("cache, bytes a token (measured)", before, after))
    if "ring_bytes" in measured:
        before, after = measured["ring_bytes"]
        rows.append(_row("windows, bytes a row", before, after))
    before, after = (_parameters(p) for p in (result.reference, result.program))
    rows.append(_row("parameters", before, after))
    return rows


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    change = f"{after / before - 1:+.1%}" if before else ""
    return (name, f"{before:,}", f"{after:,}", change)


def _parameters(program: Any) -> int:
    from attnopt.weights import described

    program = program.main
    bound = {b.name for b in program.bindings.values() if b.kind == "parameter"}
    return sum(math.prod(described(program.weights, name).shape) for name in bound)


def _quality_rows(result: "Result") -> list[tuple[str, str, str, str]]:
    return [] if result.report is None else result.report.scores.rows()


def _verdict(result: "Result") -> str:
    report = result.report
    assert report is not None
    return "\n".join([report.verdict, *report.notes])
