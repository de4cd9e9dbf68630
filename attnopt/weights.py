"""Weights that are not all in memory: what is known of them unread, and new ones put on disk."""

import contextlib
import ctypes
import hashlib
import shutil
import tempfile
import weakref
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from attnopt.tensorfiles import Described, TensorFile, write_tensors

LARGEST = 2**30
_PLACES, _ELEMENTS = 16, 2048


def described(weights: Mapping[str, Tensor], name: str) -> Described:
    """Return shape and type of a weight; one that lies on disk is not read."""
    if isinstance(weights, ChainMap):
        return described(next((m for m in weights.maps if name in m), {}), name)
    describe = getattr(weights, "describe", None)
    found: Described = Described.of(weights[name]) if describe is None else describe(name)
    return found


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Tell weights from others by their names and types, and by samples of their numbers."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        shape, dtype = described(weights, name)
        whole.update(f"{name} {shape} {dtype}\n".encode())
        whole.update(_sampled(weights, name).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _sampled(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if isinstance(weights, ChainMap):
        return _sampled(next(m for m in weights.maps if name in m), name)
    sample = getattr(weights, "sample", None)
    if sample is not None:
        found: Tensor = sample(name, _PLACES, _ELEMENTS)
        return found
    flat = weights[name].detach().cpu().contiguous().reshape(-1)
    return torch.cat([flat[a : a + n] for a, n in spread(flat.numel(), _PLACES, _ELEMENTS)])


def spread(size: int, places: int, count: int) -> list[tuple[int, int]]:
    """Choose stretches of `count` elements out of so many, evenly spread: (start, length)."""
    if size <= places * count:
        return [(0, size)]
    return [(place * (size - count) // (places - 1), count) for place in range(places)]


def give_back() -> None:
    """Hand freed memory back to the system, where the C library would keep it (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Spool(MutableMapping[str, Tensor]):
    """New weights by name: in memory as long as they are few, else in files of their own.

    The files lie in a temporary directory, which goes when nobody holds the spool any more.
    """

    def __init__(self, most: int = LARGEST) -> None:
        self._most = most
        self._size = 0
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, TensorFile] = {}
        self._folder: Path | None = None
        self._written = 0

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name][name] if name in self._files else self._held[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.pop(name, None)
        self._held[name] = tensor
        self._size += Described.of(tensor).bytes
        if self._folder is not None or self._size > self._most:
            self._write()

    def __delitem__(self, name: str) -> None:
        if name in self._files:
            self._files.pop(name).path.unlink()
        else:
            self._size -= Described.of(self._held.pop(name)).bytes

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._files

    def __iter__(self) -> Iterator[str]:
        yield from (*self._files, *self._held)

    def __len__(self) -> int:
        return len(self._held) + len(self._files)

    @property
    def folder(self) -> Path | None:
        """Where the files lie, once there are some."""
        return self._folder

    def describe(self, name: str) -> Described:
        """Return shape and type of a weight."""
        if name in self._files:
            return self._files[name].describe(name)
        return Described.of(self._held[name])

    def _write(self) -> None:
        """Put everything that is in memory on disk."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="attnopt-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        for name, tensor in self._held.items():
            self._written += 1
            place = self._folder / f"{self._written:06}.safetensors"
            write_tensors(place, {name: Described.of(tensor)}, self._held.__getitem__)
            self._files[name] = TensorFile(place)
        self._held.clear()
        self._size = 0
        give_back()
