"""Safetensors files read and written tensor by tensor, so that memory holds one tensor at a time.

Tensors are read into fresh memory and not mapped: a mapped file counts as memory of the process as
long as its pages are there, and a checkpoint that is read once would fill it.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100 * 2**20

# In the order of the format: tensors of later types are stored first.
_TYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES.values())}


class Described(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Described":
        """Describe a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        """The size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    described: Described
    start: int


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read one at a time.

    The header is read again where another file took the place of the one that it was read from.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._stamp: tuple[int, int, int] | None = None
        self._entries: dict[str, _Entry] = {}
        self._notes: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        with self.path.open("rb") as file:
            return self._filled(file, self._known(file)[name], None)

    def __contains__(self, name: object) -> bool:
        return name in self._current()

    def __iter__(self) -> Iterator[str]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    @property
    def notes(self) -> dict[str, str]:
        """The metadata of the file."""
        self._current()
        return self._notes

    def describe(self, name: str) -> Described:
        """Return shape and type of a tensor."""
        return self._current()[name].described

    def sample(self, name: str, start: int, count: int) -> Tensor:
        """Read some of the elements of a tensor, in the order in which they lie."""
        with self.path.open("rb") as file:
            return self._filled(file, self._known(file)[name], (start, count))

    def _filled(self, file: BinaryIO, entry: _Entry, part: tuple[int, int] | None) -> Tensor:
        shape, dtype = entry.described
        first, count = (0, math.prod(shape)) if part is None else part
        made = torch.empty(count, dtype=dtype)
        file.seek(entry.start + first * dtype.itemsize)
        if count:
            held: memoryview = made.view(torch.uint8).numpy().data
            if file.readinto(held) != len(held):  # type: ignore[attr-defined]
                raise ValueError(f"{self.path} is cut off")
        return made if part is not None else made.view(shape)

    def _current(self) -> dict[str, _Entry]:
        with self.path.open("rb") as file:
            return self._known(file)

    def _known(self, file: BinaryIO) -> dict[str, _Entry]:
        found = os.fstat(file.fileno())
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if stamp != self._stamp:
            try:
                self._entries, self._notes = _header(file, found.st_size)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise ValueError(f"{self.path} is no safetensors file: {error}") from error
            self._stamp = stamp
        return self._entries


def _header(file: BinaryIO, size: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Read where each tensor lies; none may reach beyond the file."""
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\xff"))
    if length > _LARGEST_HEADER:
        raise ValueError("its header is too long")
    content: dict[str, Any] = json.loads(file.read(length))
    notes = content.pop("__metadata__", None) or {}
    entries: dict[str, _Entry] = {}
    for name, told in content.items():
        described = Described(tuple(int(n) for n in told["shape"]), _TYPES[told["dtype"]])
        start, stop = (int(n) + _LENGTH.size + length for n in told["data_offsets"])
        within = _LENGTH.size + length <= start and stop <= size
        if not within or stop - start != described.bytes or min(described.shape, default=0) < 0:
            raise ValueError(f"the size of {name[:80]!r} is wrong")
        entries[name] = _Entry(described, start)
    return entries, notes


def write_tensors(
    path: str | os.PathLike[str],
    described: Mapping[str, Described],
    read: Callable[[str], Tensor],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, asking for one tensor at a time; the bytes are save_file's."""
    order = sorted(described, key=lambda name: (-_ORDER[described[name].dtype], name))
    with Path(path).open("wb") as file:
        file.write(_head(order, described, notes))
        for name in order:
            tensor = read(name)
            if Described.of(tensor) != described[name]:
                raise ValueError(f"{name} is {Described.of(tensor)}, not {described[name]}")
            file.write(_bytes_of(tensor))
            del tensor


def _head(
    order: Iterable[str], described: Mapping[str, Described], notes: Mapping[str, str] | None
) -> bytes:
    content: dict[str, Any] = {} if notes is None else {"__metadata__": dict(notes)}
    end = 0
    for name in order:
        shape, dtype = described[name]
        start, end = end, end + described[name].bytes
        content[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


def put(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], notes: Mapping[str, str]
) -> None:
    """Write tensors in one step: the file is there whole, or as it was before."""
    place = Path(path)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        write_tensors(
            beside, {n: Described.of(t) for n, t in tensors.items()}, tensors.__getitem__, notes
        )
        settle(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def settle(beside: Path, place: Path) -> None:
    """Put a finished file, forced to the disk, in the place of another."""
    handle = os.open(beside, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    beside.replace(place)
