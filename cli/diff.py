"""Show what differs between two checkpoints, two artifacts, or two plans.

attnopt diff examples/models/code-llama out/code-llama-half

Exit status: 0 compared (the same or not), 2 usage, 5 refused for safety.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli._errors import CommandError, Exit
from attnopt.cli._output import Output

if TYPE_CHECKING:
    from attnopt.artifacts.comparing import Changed, Difference

_FEW = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the two sides."""
    for name in ("A", "B"):
        parser.add_argument(name, help="a checkpoint or artifact directory, or a plan.yaml")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Compare and print."""
    from attnopt.artifacts.comparing import compare
    from attnopt.artifacts.manifest import IntegrityError

    places = [Path(arguments.A), Path(arguments.B)]
    for place in places:
        if not place.exists():
            raise CommandError("AO102", f"no file or directory {place}")
    try:
        with output.progress() as stages, stages.stage("compare"):
            found = compare(*places)
    except IntegrityError as error:
        raise CommandError("AO502", str(error), Exit.SAFETY) from error
    except ValueError as error:
        raise CommandError("AO104", " ".join(str(error).split())) from error
    if output.json:
        sides = {"a": arguments.A, "b": arguments.B}
        output.document("attnopt.diff/1", {**sides, **found.content()})
    else:
        _print(output, found, verbose=arguments.verbose)
    return Exit.ACCEPTED


def _print(output: Output, found: "Difference", *, verbose: bool) -> None:
    if found.none:
        output.line(f"the same: {found.equal} tensors are equal bit by bit, and all settings")
        return
    for title, settings in (
        ("setting", found.settings),
        ("site", found.choices),
        ("report", found.report),
    ):
        rows = [(s.name, _said(s.a), _said(s.b)) for s in settings]
        _table(output, (title, "A", "B"), rows, verbose=verbose)
    tensors = [(t.name, _shape(t.a), _shape(t.b), _change(t)) for t in found.tensors]
    _table(output, ("tensor", "A", "B", "change (RMS)"), tensors, verbose=verbose)
    output.line(f"{found.equal} tensors are equal bit by bit, {len(found.tensors)} are not")


def _table(
    output: Output, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, verbose: bool
) -> None:
    if not rows:
        return
    shown = rows if verbose else rows[:_FEW]
    output.table(headings, shown, foldable=set(headings))
    if len(shown) < len(rows):
        output.line(f" and {len(rows) - len(shown)} more (-v shows all)")
    output.line()


def _said(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"[{', '.join(map(_said, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape)) or "one number"


def _change(tensor: "Changed") -> str:
    return "" if tensor.change is None else f"{tensor.change:.2%}"
