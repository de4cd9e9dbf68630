"""MODEL on the command line: what it names, and how it becomes a Program.

MODEL is a checkpoint directory, a hub id, `package.module:factory`, or with `--trust-pickle` a
saved ExportedProgram (`.pt2`). Naming one runs no code from a checkpoint and opens no pickle.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attnopt import debug
from attnopt.cli import _checkpoint
from attnopt.cli._errors import CommandError, Exit, suggestion

if TYPE_CHECKING:
    from attnopt.program import Program

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A model that the command line names, and what the user trusts."""

    text: str
    kind: Literal["directory", "hub", "factory", "exported"]
    trust_pickle: bool = False
    trust_remote_code: bool = False

    @property
    def is_own(self) -> bool:
        """Whether it is a module of the user's, with names of its own for what it takes."""
        return self.kind in ("factory", "exported")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and what belongs to it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint directory, a hub id, package.module:factory, or a .pt2 file",
    )
    parser.add_argument(
        "--trust-pickle", action="store_true", help="open a .pt2 file, which may run code"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of the checkpoint's author"
    )


def resolve(arguments: argparse.Namespace) -> Source:
    """Decide what MODEL names, and refuse what cannot or must not be opened."""
    text: str = arguments.model
    if not text.strip():
        raise CommandError("AO102", "MODEL is empty: name a checkpoint directory")
    path = Path(text).expanduser()
    kind: Literal["directory", "hub", "factory", "exported"]
    if path.is_dir():
        _checkpoint.check(path)
        kind, text = "directory", str(path)
    elif path.is_file():
        _check_exported(path, trusted=arguments.trust_pickle)
        kind = "exported"
    elif path.suffix == ".pt2":
        raise _missing(path)
    elif _FACTORY.fullmatch(text):
        kind = "factory"
    elif _HUB_ID.fullmatch(text) and not _means_a_path(path):
        kind = "hub"
    else:
        raise _missing(path)
    return Source(text, kind, arguments.trust_pickle, arguments.trust_remote_code)


def capture(source: Source) -> "Program":
    """Capture the model; what the user can mend becomes a one-line error."""
    if source.kind == "factory" and "" not in sys.path:
        sys.path.insert(0, "")
    with quiet_libraries():
        import attnopt

        try:
            return attnopt.capture(
                source.text,
                trust_pickle=source.trust_pickle,
                trust_remote_code=source.trust_remote_code,
            )
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise explained(error, source) from error


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Keep the libraries' warnings and bars away from the user, except when debugging."""
    if debug.level() >= 1:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def _check_exported(path: Path, *, trusted: bool) -> None:
    if path.suffix != ".pt2":
        raise CommandError(
            "AO102", f"{path} is a file; MODEL is a checkpoint directory, or a .pt2 file"
        )
    if not trusted:
        raise CommandError(
            "AO503",
            f"refused: {path} may run code on loading; add --trust-pickle where you trust it",
            Exit.SAFETY,
        )


def _means_a_path(path: Path) -> bool:
    """Whether text that could be a hub id names a folder here, judged by its first part."""
    return len(path.parts) > 1 and Path(path.parts[0]).is_dir()


def _missing(path: Path) -> CommandError:
    """Name the nearest thing that does exist."""
    parent = path.parent
    if not parent.is_dir():
        return CommandError("AO102", f"no file or directory {path}: there is no {parent}")
    hint = suggestion(str(path), map(str, parent.iterdir()))
    return CommandError("AO102", f"no file or directory {path}{hint}")


@dataclass(frozen=True)
class _Reading:
    """How the capture's own words become a code and a status; the first that fits counts."""

    words: str
    code: str
    status: Exit


_READINGS = (
    _Reading(words="trust_remote_code", code="AO505", status=Exit.SAFETY),
    _Reading(words="pickle", code="AO503", status=Exit.SAFETY),
    _Reading(words="leaves the directory", code="AO502", status=Exit.SAFETY),
    _Reading(words="safetensors file", code="AO504", status=Exit.SAFETY),
    _Reading(words="hub did not give", code="AO602", status=Exit.RESOURCES),
    _Reading(words="quantised", code="AO106", status=Exit.USAGE),
    _Reading(words="cannot capture", code="AO202", status=Exit.NOTHING),
)
_OTHERWISE = _Reading(words="", code="AO104", status=Exit.USAGE)


def explained(error: Exception, source: Source) -> CommandError:
    """Tell the user's mistakes from refusals and from what the network does."""
    message = " ".join(str(error).split())
    reading = next((r for r in _READINGS if r.words in message), _OTHERWISE)
    if source.text not in message:
        message = f"{source.text}: {message}"
    return CommandError(reading.code, message, reading.status)
