"""What goes wrong at the command line: a code, one line, and an exit status.

A line says what happened, where, what is allowed, and the next command. The codes are stable:
AO1xx usage, AO2xx nothing found, AO5xx refused for safety, AO6xx resources, AO9xx attnopt's own.
"""

import difflib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from enum import IntEnum


class Exit(IntEnum):
    """The exit statuses, the same for every command."""

    ACCEPTED = 0
    INTERNAL = 1
    USAGE = 2
    NOTHING = 3
    GATE = 4
    SAFETY = 5
    RESOURCES = 6
    INTERRUPTED = 130


class CommandError(Exception):
    """A failed command, told in one line."""

    def __init__(self, code: str, message: str, status: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return f"{self.code} {self.message}"


@contextmanager
def told(out: str, code: str) -> Generator[None]:
    """Say in one line why something was not written to `out`; `code` is that of a wrong value."""
    try:
        yield
    except NotImplementedError as error:
        raise CommandError("AO203", str(error), Exit.NOTHING) from error
    except OSError as error:
        raise CommandError("AO602", f"cannot write {out}: {error}", Exit.RESOURCES) from error
    except ValueError as error:
        raise CommandError(code, " ".join(str(error).split())) from error


def suggestion(given: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return '; did you mean ...?' for the nearest allowed name, or an empty string."""
    near = difflib.get_close_matches(given, list(allowed), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
