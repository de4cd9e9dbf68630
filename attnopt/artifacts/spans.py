"""Tensors of safetensors files as spans of bytes: hashed and copied without being read as numbers.

A file is the length of its header, the header (JSON), and the bytes of the tensors without a gap.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 2**20
_LARGEST_HEADER = 100 * 2**20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in a file."""

    path: Path
    start: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes piece by piece; ValueError where the file ends before them."""
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise ValueError(f"{self.path} is cut off")
                left -= len(block)
                yield block

    def digest(self) -> str:
        """Return the sha256 of the bytes."""
        whole = hashlib.sha256()
        for block in self.blocks():
            whole.update(block)
        return whole.hexdigest()

    def copy(self, file: BinaryIO) -> str:
        """Append the bytes to an open file, and return their sha256."""
        whole = hashlib.sha256()
        for block in self.blocks():
            whole.update(block)
            file.write(block)
        return whole.hexdigest()


@dataclass(frozen=True)
class Header:
    """The header of a file as it stands there, and the size of each tensor in their order."""

    text: str
    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, text: str) -> "Header":
        """Read a header; ValueError where its tensors do not follow each other without a gap."""
        try:
            content: dict[str, Any] = json.loads(text)
            offsets = {n: t["data_offsets"] for n, t in content.items() if n != "__metadata__"}
            places = sorted((int(a), int(b), name) for name, (a, b) in offsets.items())
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ValueError("no header of a safetensors file") from error
        end = 0
        for start, stop, name in places:
            if start != end or stop < start:
                raise ValueError(f"tensor {name[:80]!r} does not begin where another ends")
            end = stop
        return cls(text, {name: stop - start for start, stop, name in places})

    @classmethod
    def of(cls, path: Path) -> "Header":
        """Read the header of a file, whose size must be what it promises."""
        with path.open("rb") as file:
            length = _LENGTH.unpack(file.read(8).ljust(8, b"\xff"))[0]
            text = file.read(length) if length <= _LARGEST_HEADER else b""
        try:
            found = cls.parse(text.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        if path.stat().st_size != found.start + sum(found.sizes.values()):
            raise ValueError(f"{path} is cut off, or longer than its header says")
        return found

    @property
    def start(self) -> int:
        """Where the tensors begin in the file."""
        return _LENGTH.size + len(self.text.encode("utf-8"))

    def spans(self, path: Path) -> dict[str, Span]:
        """Return the place of each tensor in a file with this header."""
        found: dict[str, Span] = {}
        start = self.start
        for name, size in self.sizes.items():
            found[name] = Span(path, start, size)
            start += size
        return found

    def only(self, names: Iterable[str]) -> "Header":
        """Return the header of a file that holds some of the tensors, in the same order."""
        content: dict[str, Any] = json.loads(self.text)
        kept = set(names)
        made: dict[str, Any] = {}
        end = 0
        for name, size in self.sizes.items():
            if name in kept:
                made[name] = {**content[name], "data_offsets": [end, end + size]}
                end += size
        text = json.dumps(made, separators=(",", ":"))
        # Tensors begin at a multiple of eight bytes.
        return Header.parse(text + " " * (-len(text.encode("utf-8")) % 8))

    def write(self, file: BinaryIO) -> None:
        """Write the length and the header; the tensors follow."""
        encoded = self.text.encode("utf-8")
        file.write(_LENGTH.pack(len(encoded)) + encoded)


def spans_of(path: Path) -> dict[str, Span]:
    """Return the place of each tensor in a file."""
    return Header.of(path).spans(path)
