"""The manifest of an artifact: the size and the hash of every file, written last."""

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

FOLDER = "attnopt"
NAME = f"{FOLDER}/manifest.json"
FORMAT = 1
_BLOCK = 2**20
_LARGEST = 2**24


class IntegrityError(ValueError):
    """An artifact is not what its manifest says."""


def write_manifest(root: Path) -> None:
    """Hash every file below a directory."""
    files = {
        name: {"size": (root / name).stat().st_size, "sha256": digest(root / name)}
        for name in files_below(root)
        if name != NAME
    }
    write_listed(root, files)


def write_listed(root: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    """Write a manifest of files whose sizes and hashes are known."""
    (root / NAME).write_bytes(_rendered(files))


def _rendered(files: Mapping[str, Any]) -> bytes:
    """Return the one text that a manifest of these files has."""
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    return f"{text}\n".encode()


@contextmanager
def unchanged(root: Path) -> Generator[None]:
    """Raise IntegrityError where another artifact took the place of one that was being read."""
    before = _stamp(root)
    try:
        yield
    finally:
        if _stamp(root) != before:
            raise IntegrityError(f"{root} was replaced while it was read; load it again")


def _stamp(root: Path) -> tuple[int, int] | None:
    """Return what a manifest shares with no other, which was written at another time."""
    try:
        found = (root / NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def check_manifest(root: Path, *, strict: bool = True) -> None:
    """Raise IntegrityError where a file is missing, changed, or (if strict) not listed."""
    listed = listed_files(root)
    present = set(files_below(root)) - {NAME}
    for name, entry in listed.items():
        place = root / name
        if name not in present:
            raise IntegrityError(f"{str(place)[:300]} is missing; the manifest lists it")
        if place.stat().st_size != entry["size"] or digest(place) != entry["sha256"]:
            raise IntegrityError(
                f"{place} does not match its sha256 in manifest.json (bit rot or an edit); "
                "save the artifact again, or load(strict=False) where you edited it yourself"
            )
    extra = sorted(present - set(listed))
    if strict and extra:
        raise IntegrityError(
            f"{root / extra[0]} is not in the manifest; load(strict=False) passes over such files"
        )


def files_below(root: Path) -> Iterator[str]:
    """Yield the path of every file below a directory; links and special files are refused."""
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            place = Path(folder) / name
            if place.is_symlink() or not (place.is_file() or place.is_dir()):
                raise IntegrityError(f"{place} is a link or a special file, which no artifact has")
        yield from ((Path(folder) / n).relative_to(root).as_posix() for n in sorted(names))


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    return whole.hexdigest()


def listed_files(root: Path) -> dict[str, dict[str, object]]:
    """Return the size and the hash of every file that a manifest lists, by path."""
    place = root / NAME
    if not place.is_file():
        raise IntegrityError(
            f"{root} is no artifact of attnopt: it has no {NAME} (an artifact whose save was "
            "interrupted has none either)"
        )
    try:
        if place.stat().st_size > _LARGEST:
            raise ValueError("larger than any manifest")
        text = place.read_bytes()
        content = json.loads(text)
        files: dict[str, dict[str, object]] = content["files"]
        format_ = content["format"]
        for name, entry in files.items():
            outside = ".." in name.split("/") or PurePosixPath(name).is_absolute()
            if outside or not isinstance(entry["size"], int) or len(str(entry["sha256"])) != 64:
                raise ValueError(f"entry {name[:120]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{place} is broken: {error}") from error
    if format_ != FORMAT:
        raise IntegrityError(f"{place} has format {format_!r}; this attnopt reads {FORMAT}")
    if text != _rendered(files):
        raise IntegrityError(f"{place} is not as attnopt writes it (bit rot or an edit)")
    return files
