"""Diagnostics: how much to say, and where the graphs go.

This is the only module that reads the environment. `ATTNOPT_DEBUG` is a level from 0 to 6:

1. the site table and the plan, and tracebacks of failed commands
2. time and node count of every stage
3. every rule that fired, with its source line
4. near misses and refusals
5. every intermediate graph, written to the folder `ATTNOPT_DUMP`
6. generated kernels

Setting `ATTNOPT_DUMP` alone writes the graphs and says nothing. The files are readable Python named
in the order of the stages (`00-capture.py`, `10-normalize.py`), so `diff` shows what a stage did.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import GraphModule

HIGHEST = 6
_DEFAULT_FOLDER = Path("attnopt-dump")
_GRAPHS, _TIMES = 5, 2

Listener = Callable[[str, int, int], None]
# Hears of a stage when it begins, without a time, and when it ends, with its seconds.
StageListener = Callable[[str, float | None], None]
Reader = Callable[[str], None]

_level: ContextVar[int | None] = ContextVar("level", default=None)
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_reader: ContextVar[Reader | None] = ContextVar("reader", default=None)
_stages: ContextVar[StageListener | None] = ContextVar("stages", default=None)


@contextmanager
def debug(level: int, *, folder: Path | str | None = None) -> Generator[None]:
    """Use another level, and another folder for graphs, inside a `with` block."""
    level_token = _level.set(_checked(level))
    folder_token = _folder.set(_folder.get() if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(folder_token)
        _level.reset(level_token)


def level() -> int:
    """Return the level in force: that of the innermost `with debug(...)`, or the environment's."""
    chosen = _level.get()
    return _level_of_environment() if chosen is None else chosen


def log(at: int, message: str | Callable[[], str]) -> None:
    """Write a message to stderr if the level is at least `at`; a callable is called only then."""
    if level() >= at:
        text = message if isinstance(message, str) else message()
        print(f"attnopt[{at}] {text}", file=sys.stderr)


def dump(stage: int, name: str, graph_module: "GraphModule") -> None:
    """Write the graph after a stage as readable Python, if graphs are wanted."""
    folder = _dump_folder()
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.py"
    path.write_text(graph_module.print_readable(print_output=False), encoding="utf-8")
    log(_GRAPHS, f"{path}: {len(graph_module.graph.nodes)} nodes")


@contextmanager
def timed(name: str) -> Generator[None]:
    """Log how long a stage took."""
    start = time.perf_counter()
    yield
    log(_TIMES, f"{name}: {time.perf_counter() - start:.3f} s")


@contextmanager
def stage(name: str) -> Generator[None]:
    """Tell whoever listens that a stage begins and that it is over, and log how long it took."""
    listener = _stages.get()
    if listener is not None:
        listener(name, None)
    start = time.perf_counter()
    with timed(name):
        yield
    if listener is not None:
        listener(name, time.perf_counter() - start)


def announce(message: str) -> None:
    """Tell whoever reads along something worth knowing before the work is done."""
    log(_TIMES, message)
    reader = _reader.get()
    if reader is not None:
        reader(message)


def advance(stage: str, done: int, total: int) -> None:
    """Tell whoever listens that `done` of `total` steps of a stage are finished."""
    listener = _listener.get()
    if listener is not None:
        listener(stage, done, total)


@contextmanager
def listening(listener: Listener) -> Generator[None]:
    """Pass every `advance` inside the block to a listener, such as a progress bar."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def reading(reader: Reader) -> Generator[None]:
    """Pass every `announce` inside the block to a reader, such as a terminal."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


@contextmanager
def hearing(listener: StageListener) -> Generator[None]:
    """Tell a listener of every stage inside the block."""
    token = _stages.set(listener)
    try:
        yield
    finally:
        _stages.reset(token)


def _dump_folder() -> Path | None:
    """Return where graphs go, or None where nobody asked for them."""
    named = _folder.get() or os.environ.get("ATTNOPT_DUMP")
    if named:
        return Path(named)
    return _DEFAULT_FOLDER if level() >= _GRAPHS else None


def _level_of_environment() -> int:
    text = os.environ.get("ATTNOPT_DEBUG") or "0"
    if not text.isdecimal():
        raise ValueError(f"ATTNOPT_DEBUG is {text!r}; it takes a number from 0 to {HIGHEST}")
    return _checked(int(text))


def _checked(value: int) -> int:
    if not 0 <= value <= HIGHEST:
        raise ValueError(f"debug level {value} does not exist; levels go from 0 to {HIGHEST}")
    return value
