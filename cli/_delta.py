"""`attnopt export` to a delta and back: an artifact without what its base has, and both as one."""

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.artifacts.delta import Delta


def write(arguments: argparse.Namespace, output: Output) -> int:
    """Write a delta, and say what is in it."""
    from attnopt.artifacts.delta import export_delta

    with output.progress() as stages, stages.stage("export"), _told(arguments):
        made = export_delta(
            arguments.model, arguments.out, arguments.base, statistics=arguments.statistics
        )
    if output.json:
        output.document("attnopt.export/1", {**made.content(), "out": str(made.path)})
    else:
        _summary(output, made)
    return Exit.ACCEPTED


def join(arguments: argparse.Namespace, output: Output) -> int:
    """Write the artifact that a delta was made from."""
    from attnopt.artifacts.restoring import restore

    if arguments.base is None:
        raise CommandError("AO111", "--to full puts a delta and its base together: give --base DIR")
    with output.progress() as stages, stages.stage("export"), _told(arguments):
        place = restore(arguments.model, arguments.base, arguments.out)
    if output.json:
        output.document("attnopt.export/1", {"out": str(place), "base": arguments.base})
    else:
        output.line(f"saved as {shown(place)}: every file has its sha256 of before")
    return Exit.ACCEPTED


@contextmanager
def _told(arguments: argparse.Namespace) -> Generator[None]:
    """Tell what is refused for integrity from mistakes."""
    from attnopt.artifacts.manifest import IntegrityError

    with told(arguments.out, "AO114"):
        try:
            if not Path(arguments.model).is_dir():
                raise ValueError(f"{arguments.model} is no directory of an artifact or a delta")
            yield
        except IntegrityError as error:
            raise CommandError("AO502", " ".join(str(error).split()), Exit.SAFETY) from error


def _summary(output: Output, made: "Delta") -> None:
    counts = (
        f"{len(made.changed)} changed",
        f"{len(made.new)} new",
        f"{len(made.removed)} removed",
        f"{made.equal} as in the base",
    )
    output.line(f"tensors, beside {made.base}: {', '.join(counts)}")
    share = made.delta_bytes / made.artifact_bytes
    output.line(f"bytes: {made.artifact_bytes:,} -> {made.delta_bytes:,} ({share:.1%})")
    for name in made.left_out:
        output.line(f"left out: {name}, which replays the plan (--statistics keeps it)")
    place = shown(made.path)
    output.line(f"saved as {place}: no model without its base")
    output.line(f"  attnopt export {place} --to full --base BASE -o OUT")
