"""A calibration on disk: what is finished, and where its runs stand, so that it can go on later.

Beside the file that is to be made lies a directory with the sums of the layers that are done and
the values of every run before the next layer. A layer counts as done once its sums are there, and
they are written after its values: an interrupted calibration goes on before the layer in which it
stopped, from the very numbers that it would have had.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.tensorfiles import TensorFile, put

_OTHER = {
    "program": "another model",
    "data": "other data",
    "wanted": "other parameters",
}


class BusyError(ValueError):
    """A directory in which another process calibrates."""


def place_of(out: Path) -> Path:
    """Return the file of statistics that a file or a directory stands for."""
    return out if out.suffix == ".safetensors" else out / "statistics.safetensors"


def refuse_other(found: Mapping[str, Any], wanted: Mapping[str, str], where: Path) -> None:
    """Raise ValueError where statistics are not those of this program and this data."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{where} has statistics of {_OTHER.get(name, name)}; choose another place for "
                "those of this one, or remove it"
            )


class Workplace:
    """The directory of a calibration that is not finished; one process at a time has it."""

    def __init__(self, place: Path, identity: Mapping[str, str]) -> None:
        self.folder = place.with_name(f".{place.name}.partial")
        self.identity = identity
        self._lock = -1

    def __enter__(self) -> "Workplace":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            self._claim()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _claim(self) -> None:
        """Say what is calibrated here; ValueError where it was something else."""
        told = self.folder / "identity.json"
        if told.is_file():
            refuse_other(json.loads(told.read_text("utf-8")), self.identity, self.folder)
        else:
            beside = told.with_suffix(".tmp")
            beside.write_text(json.dumps(dict(self.identity)), "utf-8")
            beside.replace(told)

    @property
    def whole(self) -> Path:
        """Where the file is made that is to lie beside this directory."""
        return self.folder / "whole.safetensors"

    def done(self) -> int:
        """Count the layers that are finished."""
        count = 0
        while self._sums(count).is_file():
            count += 1
        return count

    def finish(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write the sums of a layer, and drop the values that led to it."""
        put(self._sums(layer), tensors, {"attnopt": json.dumps(notes)})
        for left in self.folder.glob(f"run-{layer:05}-*.safetensors"):
            left.unlink()

    def sums(self, layer: int) -> tuple[TensorFile, dict[str, Any]]:
        """Return the sums of a finished layer, unread, and what was noted of them."""
        file = TensorFile(self._sums(layer))
        notes: dict[str, Any] = json.loads(file.notes["attnopt"])
        return file, notes

    def pause(self, layer: int, batch: int, values: Mapping[str, Any]) -> None:
        """Write the values of a run that stands before a layer."""
        tensors: dict[str, Tensor] = {}
        told = {name: _flat(value, name, tensors) for name, value in values.items()}
        put(self._run(layer, batch), tensors, {"values": json.dumps(told)})

    def resume(self, layer: int, batch: int) -> dict[str, Any]:
        """Read the values of a run that stands before a layer."""
        file = TensorFile(self._run(layer, batch))
        told = json.loads(file.notes["values"])
        return {name: _whole(value, file) for name, value in told.items()}

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sums(self, layer: int) -> Path:
        return self.folder / f"sums-{layer:05}.safetensors"

    def _run(self, layer: int, batch: int) -> Path:
        return self.folder / f"run-{layer:05}-{batch:05}.safetensors"


def _locked(folder: Path) -> int:
    """Lock a directory until this process ends or closes it; -1 where the system cannot."""
    if sys.platform == "win32":
        return -1
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BusyError(
            f"another process is calibrating in {folder}; wait for it, or choose another place"
        ) from error
    except OSError:
        os.close(handle)
        return -1
    return handle


class SharedLock:
    """A directory that several processes use at once; none of them may remove it under another."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def alone(self) -> bool:
        """Whether no other process uses it."""
        import fcntl

        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Use it no more."""
        os.close(self._handle)


def shared_lock(folder: Path) -> SharedLock | None:
    """Use a directory, made where there is none; None where the system cannot lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        os.close(handle)
        return None
    return SharedLock(handle)


def _flat(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, its tensors as their names in a file."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, list | tuple):
        return [_flat(v, name, tensors) for v in value]
    if isinstance(value, int | float | str | None):
        return value
    raise NotImplementedError(
        f"cannot put a calibration on disk between layers: {name} is a {type(value).__name__}; "
        "calibrate without out"
    )


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value["tensor"]]
    return [_whole(v, tensors) for v in value] if isinstance(value, list) else value


def data_digest(batches: list[dict[str, Any]]) -> str:
    """Name batches by their content."""
    whole = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            whole.update(f"{name} {getattr(value, 'shape', repr(value))}\n".encode())
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().reshape(-1)
                whole.update(f"{value.dtype}\n".encode())
                whole.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return whole.hexdigest()
