"""Rewrite a checkpoint to meet a goal, prove what it costs, and save it.

attnopt optimize examples/models/code-llama -o out --kv-cache 50% --max-drop 10%

Exit status: 0 accepted, 2 usage, 3 nothing to do, 4 the quality gate failed (the best candidate is
kept as OUT.rejected), 5 refused for safety, 6 resources, 130 interrupted (OUT is what it was).
"""

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source, _trial
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result

_LATER = {"flops": "operations", "latency": "time"}
_BUDGETS = ("kv_cache", "params")
DATA = "stdlib:48x256"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the goal, the data and the place of the result."""
    _source.configure(parser)
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the result goes")
    parser.add_argument(
        "--kv-cache", metavar="SHARE", help="how much of the cache may stay, such as 50%%"
    )
    parser.add_argument(
        "--params", metavar="SHARE", help="how many of the parameters may stay, such as 80%%"
    )
    parser.add_argument(
        "--tier",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="what may hold the result: 0 a stock checkpoint, all layers alike (default); 1 one "
        "whose layers differ, 2 a saved program; both load after `import attnopt`",
    )
    parser.add_argument(
        "--passes",
        metavar="NAME",
        nargs="+",
        help="choose among these rewrites only; `--passes window` keeps some heads whole and gives "
        "the others a window (tier 2); `attnopt passes` lists all",
    )
    parser.add_argument(
        "--max-drop",
        metavar="SHARE",
        help="how much the held-out loss may rise, such as 1%%; the upper bound of its 95 %% "
        "confidence interval is compared",
    )
    parser.add_argument("--plan", metavar="FILE", help="carry out a plan.yaml instead of searching")
    parser.add_argument(
        "--data",
        metavar="NAME[:ROWSxTOKENS]",
        default=DATA,
        help="text to calibrate with and to judge by: stdlib (Python's own library), a file, a "
        f"folder, or a .safetensors of input_ids (default {DATA})",
    )
    parser.add_argument(
        "--held-out", metavar="ROWS", type=int, default=96, help="held-out rows (default 96)"
    )
    parser.add_argument(
        "--test",
        action="store_true",
        help="run everything on a random twin of two layers in a temporary directory, in less than "
        "a minute, and leave OUT alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the text (default 0)")
    for name, what in _LATER.items():
        parser.add_argument(f"--{name}", metavar="SHARE", help=f"(not yet) a budget of {what}")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Optimize, print the summary, and say with the status whether the gate was passed."""
    goal = _goal(arguments)
    source = _source.resolve(arguments)
    if arguments.test:
        return _trial.run(arguments, output, source, goal)
    with output.progress() as stages, stages.stage("optimize"):
        result = _optimize(arguments, source, goal)
    place = _place(arguments, result)
    if output.json:
        output.document("attnopt.optimize/1", _document(result, place))
    else:
        _summary(output, result, place)
    return Exit.ACCEPTED if result.accepted else Exit.GATE


def _goal(arguments: argparse.Namespace) -> dict[str, str]:
    for name, what in _LATER.items():
        if getattr(arguments, name) is not None:
            raise CommandError(
                "AO110",
                f"--{name} (a budget of {what}) is not served yet; there are --kv-cache, --params",
            )
    named = [n for n in (*_BUDGETS, "plan") if getattr(arguments, n) is not None]
    if not named:
        raise CommandError(
            "AO111", "nothing to reach: name a goal, such as --kv-cache 50% or --params 80%"
        )
    if len(named) > 1:
        first, second = (f"--{n.replace('_', '-')}" for n in named[:2])
        raise CommandError("AO111", f"{first} and {second} exclude each other: one at a time")
    if arguments.held_out < 2:
        raise CommandError("AO111", "--held-out needs at least 2 rows for a confidence interval")
    given = {name: getattr(arguments, name) for name in (*_BUDGETS, "max_drop")}
    goal = {name: value for name, value in given.items() if value is not None}
    from attnopt.planning import checked_goal

    try:
        checked_goal(goal)
    except ValueError as error:
        raise CommandError("AO111", str(error)) from error
    return goal


def _optimize(
    arguments: argparse.Namespace, source: _source.Source, goal: dict[str, str]
) -> "Result":
    from attnopt import passes as registry
    from attnopt.artifacts.saving import refuse_foreign
    from attnopt.data import Source, checked
    from attnopt.estimating import TooLargeError
    from attnopt.nouns import Plan
    from attnopt.optimizing import optimize
    from attnopt.planning import NothingToDoError

    try:
        refuse_foreign(Path(arguments.out).absolute())
        for name in arguments.passes or ():
            registry.load(name)
        data = checked(Source.parse(arguments.data, seed=arguments.seed))
        plan = None if arguments.plan is None else Plan.load(arguments.plan)
    except ValueError as error:
        raise CommandError("AO112", str(error)) from error
    if plan is not None:
        goal = {**plan.goal, **goal}
    program = _source.capture(source)
    with told(arguments.out, "AO113"), _source.quiet_libraries():
        try:
            return optimize(
                program,
                goal,
                plan,
                data,
                arguments.out,
                held_out=arguments.held_out,
                tier=arguments.tier,
                command=_command(arguments),
                passes=arguments.passes,
            )
        except NothingToDoError as error:
            raise CommandError("AO201", str(error), Exit.NOTHING) from error
        except TooLargeError as error:
            raise CommandError("AO603", str(error), Exit.RESOURCES) from error
        except KeyboardInterrupt as error:
            raise _interrupted(Path(arguments.out)) from error


def _interrupted(out: Path) -> CommandError:
    """Say what an interruption left, and how to go on."""
    kept = sorted(p.name for p in out.absolute().parent.glob(f".{out.name}.*") if p.is_dir())
    told = f"what was measured is kept in {', '.join(kept)}, and " if kept else ""
    return CommandError(
        "AO130",
        f"interrupted; {out} is what it was before; {told}the same command goes on"
        + ("" if kept else " from the start"),
        Exit.INTERRUPTED,
    )


def _command(arguments: argparse.Namespace) -> str:
    """Return the command that makes the same again."""
    words = ["attnopt", "optimize", arguments.model, "-o", arguments.out]
    for name in (*_BUDGETS, "max_drop", "plan"):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", value]
    words += ["--data", arguments.data, "--held-out", str(arguments.held_out)]
    words += ["--seed", str(arguments.seed)]
    words += ["--tier", str(arguments.tier)] if arguments.tier else []
    words += ["--passes", *arguments.passes] if arguments.passes else []
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
