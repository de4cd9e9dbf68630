"""What a command prints: tables for people, one JSON document for machines, progress on stderr."""

import codecs
import json
import os
import sys
import time
from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt import debug
from attnopt.cli._errors import CommandError, Exit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

WIDTH = 100
# A stage shorter than this leaves no line behind where there is no terminal.
_WORTH_A_LINE = 2.0
# What is folded is not folded to less than this.
_FOLDED = 20


def shown(place: Path) -> str:
    """Return a path as short as it can be typed here."""
    here = Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) else str(place)


@dataclass(frozen=True)
class Output:
    """Where results go, and in which form."""

    json: bool = False
    quiet: bool = False

    @cached_property
    def console(self) -> "Console":
        """The console of results: at most 100 columns, colours on a terminal only."""
        from rich.console import Console

        console = Console(highlight=False)
        wide = console.size.width if console.is_terminal else WIDTH
        return Console(highlight=False, width=min(WIDTH, wide), emoji=False)

    def document(self, schema: str, content: dict[str, Any]) -> None:
        """Print a JSON document; its first key names the schema and its version."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        plain = codecs.lookup(encoding).name != "utf-8"
        say(json.dumps({"schema": schema, **content}, indent=2, ensure_ascii=plain))

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if not self.json:
            say(text)

    def note(self, text: str) -> None:
        """Print a line for people that `--quiet` leaves out."""
        if not self.quiet:
            self.line(text)

    def table(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], *, foldable: Container[str]
    ) -> None:
        """Print a table; what does not fit is folded in the columns that may be.

        Where the others alone are wider than the terminal, so is the table: nothing is cut off.
        """
        from rich.table import Table
        from rich.text import Text

        made = Table(box=None, pad_edge=True, header_style="bold", collapse_padding=True)
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
            right = all(cell[:1].isdecimal() or cell in {"", "-"} for cell in cells)
            made.add_column(
                heading,
                justify="right" if right and any(cells) else "left",
                overflow="fold",
                no_wrap=heading not in foldable,
            )
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        self.rendered(made, _least(headings, rows, foldable))

    def rendered(self, thing: Any, least: int = 0) -> None:
        """Print anything that rich renders, in `least` columns or more.

        Where there is no terminal, it has no trailing blanks.
        """
        from rich.console import Console

        width = max(least, self.console.width)
        if self.console.is_terminal:
            Console(highlight=False, width=width, emoji=False).print(thing)
            return
        page = StringIO()
        Console(file=page, highlight=False, width=width, emoji=False).print(thing)
        say("\n".join(line.rstrip() for line in page.getvalue().splitlines()))

    def error(self, error: CommandError) -> None:
        """Print a failure: a line on stderr, and with `--json` a document too."""
        if self.json:
            found = {"code": error.code, "message": error.message, "exit": int(error.status)}
            self.document("attnopt.error/1", {"error": found})
        print(error, file=sys.stderr)

    @contextmanager
    def progress(self) -> Generator["Stages"]:
        """Show the stages inside the block as they run."""
        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            yield Stages(None, quiet=self.quiet)
            return
        with _bar() as bar:
            yield Stages(bar, quiet=False)


def say(text: str, end: str = "\n") -> None:
    """Print a line at once; where nobody reads any more, the work goes on and its status counts."""
    try:
        try:
            print(text, end=end, flush=True)
        except UnicodeEncodeError:
            known = sys.stdout.encoding
            print(text.encode(known, "backslashreplace").decode(known), end=end, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise CommandError("AO602", f"cannot print: {error}", Exit.RESOURCES) from error


def _least(headings: Sequence[str], rows: Sequence[Sequence[str]], foldable: Container[str]) -> int:
    """Return how many columns a table needs at least, a blank on either side of a cell."""
    total = 1
    for heading, cells in zip(headings, zip(*rows, strict=True), strict=True):
        widest = max(len(line) for cell in (heading, *cells) for line in cell.split("\n"))
        total += 1 + (min(widest, _FOLDED) if heading in foldable else widest)
    return total


class Stages:
    """The stages of a running command."""

    def __init__(self, bar: "Progress | None", *, quiet: bool) -> None:
        self._bar = bar
        self._quiet = quiet
        self._tasks: dict[str, TaskID] = {}

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Show one stage, with the steps that it reports through `debug.advance`."""
        start = time.perf_counter()
        if self._bar is not None:
            self._tasks[name] = self._bar.add_task(name, total=None)
        with (
            debug.listening(self._advance),
            debug.hearing(self._part),
            debug.reading(self._said),
            debug.timed(name),
        ):
            yield
        spent = time.perf_counter() - start
        if self._bar is not None:
            self._bar.update(self._tasks[name], total=1, completed=1)
        elif spent > _WORTH_A_LINE and not self._quiet:
            print(f"{name}: {spent:.1f} s", file=sys.stderr)

    def _part(self, name: str, seconds: float | None) -> None:
        """Show a part of a stage as it begins, and say at its end how long it took."""
        if self._bar is None:
            if seconds is not None and seconds > _WORTH_A_LINE and not self._quiet:
                print(f"  {name}: {seconds:.1f} s", file=sys.stderr)
            return
        if seconds is None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=None)
            return
        whole = self._bar.tasks[self._tasks[name]].total or 1
        self._bar.update(self._tasks[name], total=whole, completed=whole)

    def _said(self, message: str) -> None:
        """Print what is worth knowing before the work is done."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False)
        elif not self._quiet:
            print(message, file=sys.stderr)

    def _advance(self, name: str, done: int, total: int) -> None:
        if self._bar is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name)
        self._bar.update(self._tasks[name], completed=done, total=total)


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
