"""The entry point: finds the subcommand, parses its flags, and turns failures into exit statuses.

Every file of this folder without a leading underscore is a subcommand. Its docstring is its help;
`configure(parser)` declares its arguments; `run(arguments, output)` does the work and returns an
exit status. Heavy imports belong inside `run`.
"""

import argparse
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, cast

import attnopt
from attnopt import cli, debug
from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output

_USAGE = "usage: attnopt COMMAND [ARGUMENTS] [--json] [-v] [--quiet]"


class Command(Protocol):
    """The attributes of a module that is a subcommand."""

    @property
    def configure(self) -> Callable[[argparse.ArgumentParser], None]:
        """Declare the arguments."""
        ...

    @property
    def run(self) -> Callable[[argparse.Namespace, Output], int]:
        """Do the work and return the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    output = Output(json="--json" in words, quiet="--quiet" in words)
    try:
        debug.level()
    except ValueError as error:
        output.error(CommandError("AO101", str(error)))
        return Exit.USAGE
    try:
        return _dispatch(words, output)
    except CommandError as error:
        return _failed(error, output)
    except KeyboardInterrupt:
        return _failed(CommandError("AO130", "interrupted", Exit.INTERRUPTED), output)
    except MemoryError as error:
        return _failed(CommandError("AO601", f"out of memory: {error}", Exit.RESOURCES), output)
    # A bug, of any class: it is told in one line and a status like all else, with its place.
    except Exception as error:
        internal = _internal(error)
        internal.__cause__ = error
        return _failed(internal, output)


def commands() -> dict[str, str]:
    """Return the names of the subcommands with their one-line descriptions."""
    listed = (m.name for m in pkgutil.iter_modules(cli.__path__) if not m.name.startswith("_"))
    return {name: _summary(name) for name in listed}


def parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand."""
    module = _load(name)
    made = _Parser(
        prog=f"attnopt {name}",
        description=importlib.import_module(_path(name)).__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(made)
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.add_argument("-v", "--verbose", action="store_true", help="print every fact")
    made.add_argument("--quiet", action="store_true", help="print results and errors only")
    return made


def _dispatch(words: list[str], output: Output) -> int:
    if not words or words[0] in {"-h", "--help"}:
        output.line(_overview())
        return Exit.ACCEPTED if words else Exit.USAGE
    if words[0] == "--version":
        output.line(f"attnopt {attnopt.__version__}")
        return Exit.ACCEPTED
    name, rest = words[0], words[1:]
    if name not in commands():
        raise _unknown_command(name)
    try:
        arguments = _parse(name, rest)
    except SystemExit:
        return Exit.ACCEPTED
    return _load(name).run(arguments, output)


def _parse(name: str, words: list[str]) -> argparse.Namespace:
    made = parser(name)
    arguments, unknown = made.parse_known_args(words)
    if unknown:
        flags = re.findall(r"--?\w[\w-]*", made.format_help())
        hint = suggestion(unknown[0], flags, cutoff=0.7)
        raise CommandError(
            "AO101",
            f"{made.prog}: unknown argument {unknown[0]!r}{hint} (attnopt {name} --help lists all)",
        )
    return arguments


class _Parser(argparse.ArgumentParser):
    """A parser that raises what it has to say."""

    def error(self, message: str) -> NoReturn:
        raise CommandError("AO101", f"{self.prog}: {message} (see {self.prog} --help)")


def _overview() -> str:
    lines = [f"  {name:<10} {summary}" for name, summary in commands().items()]
    return "\n".join(
        [
            attnopt.__doc__ or "",
            "",
            _USAGE,
            "",
            "commands:",
            *lines,
            "",
            "attnopt COMMAND --help tells more; attnopt --version prints the version.",
        ]
    )


def _unknown_command(name: str) -> CommandError:
    kind = "flag" if name.startswith("-") else "command"
    allowed = ["--help", "--version"] if kind == "flag" else list(commands())
    hint = suggestion(name, allowed) or f"; there is {', '.join(allowed)}"
    return CommandError("AO101", f"unknown {kind} {name!r}{hint} (attnopt --help tells more)")


def _path(name: str) -> str:
    return f"{cli.__name__}.{name}"


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(_path(name)))


def _summary(name: str) -> str:
    text = importlib.import_module(_path(name)).__doc__ or ""
    return text.split("\n", 1)[0]


def _internal(error: Exception) -> CommandError:
    """Wrap what nobody foresaw: a bug of attnopt, of a library, or of a factory."""
    first = re.sub(r"\s+", " ", str(error))[:300]
    return CommandError(
        "AO900",
        f"{type(error).__name__}: {first} (unforeseen; ATTNOPT_DEBUG=1 shows where)",
        Exit.INTERNAL,
    )


def _failed(error: CommandError, output: Output) -> int:
    origin = error.__cause__ or error.__context__
    if origin is not None and debug.level() >= 1:
        traceback.print_exception(origin)
    output.error(error)
    return error.status
