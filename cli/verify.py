"""Judge on held-out data what a model lost beside its reference, and whether it may.

attnopt verify out/code-llama-half examples/models/code-llama --max-drop 10%

Both are checkpoints or artifacts. The upper bound of the 95 % confidence interval of the drop is
compared with --max-drop: of a language model's loss, of an encoder's cosine, of a classifier's
accuracy or answers.

Exit status: 0 accepted, 2 usage, 3 nothing to compare, 4 the quality gate failed, 5 refused for
safety.
"""

import argparse
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output

if TYPE_CHECKING:
    from attnopt.program import Program
    from attnopt.verifying import Report

DATA = "stdlib:48x256"
# As in attnopt.verifying.tasks, which imports torch.
_TASKS = ("lm", "embedding", "classification")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the two models, the data and the gate."""
    for name in ("candidate", "reference"):
        parser.add_argument(
            name,
            metavar=name.upper(),
            help="a checkpoint or artifact directory, a hub id, or package.module:factory",
        )
    for flag, what in (
        ("--trust-pickle", "open a .pt2 file, which may run code"),
        ("--trust-remote-code", "run the code of the checkpoint's author"),
    ):
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument(
        "--data",
        metavar="NAME[#FIELD][:ROWSxTOKENS]",
        default=DATA,
        help="what to judge by, its held-out half: stdlib (Python's own library), a file or folder "
        "of text, .jsonl, .parquet, .safetensors or .npy of ids or pixels, or a folder of images "
        f"(default {DATA})",
    )
    parser.add_argument(
        "--max-drop", metavar="SHARE", help="how much may be lost, such as 1%%; without, all may"
    )
    parser.add_argument("--task", help=f"{', '.join(_TASKS)} (default: told from the result)")
    parser.add_argument(
        "--held-out", metavar="ROWS", type=int, default=96, help="held-out rows (default 96)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of masks and intervals (default 0)")
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="tasks of lm-evaluation-harness, told beside the gate: hellaswag,arc_easy",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Compare both, print what was measured, and say with the status whether the gate is passed."""
    limit = _limit(arguments)
    sources = [
        _source.resolve(argparse.Namespace(**{**vars(arguments), "model": model}))
        for model in (arguments.candidate, arguments.reference)
    ]
    with output.progress() as stages, stages.stage("verify"):
        report = _verified(arguments, sources, limit)
    if output.json:
        sides = {"candidate": arguments.candidate, "reference": arguments.reference}
        output.document("attnopt.verify/1", {**sides, **report.content()})
    else:
        _print(output, arguments, report)
    return Exit.ACCEPTED if report.accepted else Exit.GATE


def _limit(arguments: argparse.Namespace) -> float | None:
    """Check the flags, and return the drop that is allowed."""
    if arguments.task is not None and arguments.task not in _TASKS:
        hint = suggestion(arguments.task, _TASKS) or f"; there is {', '.join(_TASKS)}"
        raise CommandError("AO111", f"--task {arguments.task}{hint}")
    if arguments.held_out < 2:
        raise CommandError("AO111", "--held-out needs at least 2 rows for a confidence interval")
    if arguments.max_drop is None:
        return None
    from attnopt.planning import checked_goal

    try:
        return checked_goal({"max_drop": arguments.max_drop})["max_drop"]
    except ValueError as error:
        raise CommandError("AO111", str(error)) from error


def _verified(
    arguments: argparse.Namespace, sources: list[_source.Source], limit: float | None
) -> "Report":
    from attnopt.data import Source, readable, split_for
    from attnopt.verifying import verify
    from attnopt.verifying.harness import check_harness

    tasks = [t.strip() for t in (arguments.lm_eval or "").split(",") if t.strip()]
    try:
        data = readable(Source.parse(arguments.data), own=any(s.is_own for s in sources))
        if tasks:
            check_harness()
    except ValueError as error:
        raise CommandError("AO112", str(error)) from error
    candidate, reference = (_exact(_source.capture(s)) for s in sources)
    with _source.quiet_libraries():
        try:
            split = split_for(reference, data, arguments.held_out)
            return verify(
                candidate,
                reference,
                split,
                max_drop=limit,
                task=arguments.task,
                tasks=tasks,
                seed=arguments.seed,
            )
        except (ValueError, TypeError) as error:
            raise CommandError("AO112", " ".join(str(error).split())) from error


def _exact(program: "Program") -> "Program":
    import attnopt

    with _source.quiet_libraries():
        return attnopt.apply(program, "exact")


def _print(output: Output, arguments: argparse.Namespace, report: "Report") -> None:
    output.note(f"{arguments.candidate} beside {arguments.reference}: {report.task}")
    output.note("")
    rows: list[Any] = [*report.scores.rows(), *_benchmarks(report), *_sites(report, arguments)]
    output.table(("", "reference", "candidate", "change"), rows, foldable={""})
    output.line()
    output.line(report.verdict)
    for note in report.notes:
        output.note(note)


def _benchmarks(report: "Report") -> list[tuple[str, str, str, str]]:
    return [
        (f"{task}, {metric}", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        for task, found in report.benchmarks.items()
        for metric, (before, after) in found.items()
    ]


def _sites(report: "Report", arguments: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return the error of every site, or of the worst alone."""
    errors = {n: e for n, e in report.sites.items() if isinstance(e, float)}
    if arguments.verbose:
        return [(f"error of {n}", "", _said(e), "") for n, e in report.sites.items()]
    if not errors:
        return []
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return [(f"largest error of a site, {worst}", "", _said(errors[worst]), "")]


def _said(error: Any) -> str:
    return f"{error:.2e}" if isinstance(error, float) else str(error)
