"""Put a finished directory in its place in one step: whoever looks sees the old one or the new one.

On Linux and macOS the two directories are exchanged by one system call. Elsewhere the old one is
moved aside first; `recovered` moves it back where the second move never came.
"""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_EXCHANGE = 2


@contextmanager
def staged(target: Path) -> Generator[Path]:
    """Yield an empty directory that takes the target's place at the end, if all went well.

    One that the caller moved elsewhere takes no place.
    """
    recovered(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        if staging.is_dir():
            _flush(staging)
            _commit(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def recovered(target: Path) -> None:
    """Bring back the old directory where a process died between moving it and the new one."""
    if target.exists():
        return
    aside = sorted(target.parent.glob(f".{target.name}.old-*"))
    if aside:
        aside[-1].rename(target)


def _sweep(target: Path) -> None:
    """Remove what dead processes left behind."""
    for kind in ("tmp", "old"):
        for left in target.parent.glob(f".{target.name}.{kind}-*"):
            number = left.name.rsplit("-", 1)[1]
            if number.isdecimal() and not _alive(int(number)):
                shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
    elif not _exchange(staging, target):
        aside = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(aside)
        staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    names = (os.fsencode(a), os.fsencode(b))
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            return library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0  # type: ignore[no-any-return]
        if sys.platform == "darwin":
            return library.renamex_np(*names, _EXCHANGE) == 0  # type: ignore[no-any-return]
    return False
