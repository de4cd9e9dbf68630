"""Scores on disk: whatever was measured once is read from there the next time.

One line a score, each whole before the next begins; a line that a crash cut off counts for nothing.
Every score follows from the program, the data and its name alone, so that it does not matter when,
or in which of several runs, it was made.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Scores:
    """Scores by name, in memory, and in a file where there is one."""

    def __init__(self, path: Path | None = None, held: dict[str, Any] | None = None) -> None:
        self.path = path
        self.made = 0
        self._held: dict[str, Any] = {} if held is None else held
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held |= _read(path)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a score, made and kept where it is not known yet."""
        if name not in self._held:
            # As a file would give it back.
            value = json.loads(json.dumps(make()))
            self.made += 1
            self._held[name] = value
            if self.path is not None:
                _append(self.path, json.dumps([name, value]))
        return self._held[name]


def names_in(path: Path) -> list[str]:
    """List the scores that a file has."""
    return list(_read(path))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not path.is_file():
        return found
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            name, value = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[str(name)] = value
    return found


def _append(path: Path, line: str) -> None:
    """Add a line, on one of its own whatever a crash has left."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
