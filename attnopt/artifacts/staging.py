"""Put a finished directory in its place in one step: whoever looks sees the old one or the new one.

On Linux and macOS the two directories are exchanged by one system call. Elsewhere the old one is
moved aside first; `recovered` moves it back where the second move never came. A writer holds a lock
on its directory as long as it lives, so that others know what a dead one left behind; what happens
beside the target happens under a lock on the folder that both lie in.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_AT_FDCWD = -100
_EXCHANGE = 2
_A_DAY = 24 * 3600
_Kind = Literal["tmp", "old"]


@contextmanager
def staged(target: Path) -> Generator[Path]:
    """Yield an empty directory that takes the target's place at the end, if all went well.

    One that the caller moved elsewhere takes no place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent):
        _recover(target)
        _sweep(target)
        staging = _beside(target, "tmp")
        staging.mkdir()
        lock = _lock(staging)
    try:
        yield staging
        if staging.is_dir():
            _flush(staging)
            with _locked(target.parent):
                _commit(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)


def recovered(target: Path) -> None:
    """Bring back the old directory where a process died between moving it and the new one."""
    if not target.exists() and target.parent.is_dir():
        with _locked(target.parent):
            _recover(target)


def _recover(target: Path) -> None:
    aside = sorted(_left_by(target, "old"))
    if aside and not target.exists():
        aside[-1].rename(target)


def _sweep(target: Path) -> None:
    """Remove what dead processes left behind."""
    for left in (*_left_by(target, "tmp"), *_left_by(target, "old")):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _abandoned(left: Path) -> bool:
    """Tell whether nobody writes any more: a lock is free, or a day is over where there is none."""
    try:
        lock = _lock(left)
    except (BlockingIOError, FileNotFoundError):
        return False
    if lock is None:
        return time.time() - left.stat().st_mtime > _A_DAY
    os.close(lock)
    return True


def _beside(target: Path, kind: _Kind) -> Path:
    """Name a directory for one save; no other save, of this process or another, has the name."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _left_by(target: Path, kind: _Kind) -> Iterator[Path]:
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-\d+-[0-9a-f]{{8}}")
    return (place for place in target.parent.iterdir() if name.fullmatch(place.name))


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Let one at a time change what lies in a folder."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a directory until it is unlocked or this process ends; None where the system cannot.

    BlockingIOError: another has it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _flush(root: Path) -> None:
    """Force every file and directory to the disk."""
    for folder, _, names in os.walk(root):
        for place in (*(Path(folder) / n for n in names), Path(folder)):
            _sync(place)


def _sync(place: Path) -> None:
    if place.is_dir() and sys.platform == "win32":
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    elif not exchange(staging, target):
        aside = _beside(target, "old")
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    names = (os.fsencode(a), os.fsencode(b))
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            return library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0  # type: ignore[no-any-return]
        if sys.platform == "darwin":
            return library.renamex_np(*names, _EXCHANGE) == 0  # type: ignore[no-any-return]
    return False
