"""Arrays in `.safetensors` and `.npy` files: token ids, pixels, and what belongs to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from attnopt.untrusted import leaves

_LARGEST: Final = 2**32
MAIN: Final = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
_BESIDE: Final = (
    *("attention_mask", "token_type_ids", "position_ids", "labels"),
    *("decoder_input_ids", "decoder_attention_mask"),
)
LABELS: Final = "labels.npy"


def stored(path: Path, length: int, *, own: bool = False) -> dict[str, Tensor]:
    """Return the arrays of a file by the names that a model has for them, row by row.

    A single axis of ids is cut into rows of `length`. Bytes are pictures, named `images`. A model
    may have names of its `own`, none of which is known here.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST >> 30} GiB; save a part of it")
    if path.suffix.lower() == ".npy":
        return _with_labels(_of_array(_array(path), path, length), path)
    return _of_tensors(_tensors(path), path, own=own)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from error


def _of_tensors(tensors: Mapping[str, Tensor], path: Path, *, own: bool) -> dict[str, Tensor]:
    usual = any(name in MAIN for name in tensors)
    if not usual and not (own and tensors):
        raise ValueError(f"{path} must hold one of {', '.join(MAIN)}")
    unknown = sorted(set(tensors) - {*MAIN, *_BESIDE})
    if usual and unknown:
        raise ValueError(f"{path} holds {unknown[0]!r}; it may hold {', '.join((*MAIN, *_BESIDE))}")
    made = {name: _plain(tensor) for name, tensor in tensors.items()}
    counts = {len(t) if t.dim() else 0 for t in made.values()}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{path}: its tensors have {sorted(counts)} rows, and must have as many")
    ids = made.get("input_ids")
    if ids is not None:
        _check_ids(ids, path)
    return {name: made[name] for name in (*MAIN, *_BESIDE) if name in made} if usual else made


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def _check_ids(ids: Tensor, path: Path) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1 or ids.is_floating_point():
        raise ValueError(f"{path}: input_ids must be whole numbers, (rows, tokens)")
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"{path}: input_ids has {int(ids.min())}; ids of tokens are not negative")


def _array(path: Path) -> Any:
    """Map an array into memory; objects, which are pickles, are refused by NumPy."""
    if leaves(path):
        raise ValueError(f"{path} is a link that leaves the directory")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is no array of numbers that can be read ({told}); objects and pickles are not "
            "opened: save numbers with numpy.save"
        ) from error


def _of_array(array: Any, path: Path, length: int) -> dict[str, Tensor]:
    kind, axes = array.dtype.kind, array.ndim
    if kind in "iu" and axes in (1, 2):
        if axes == 1:
            array = array[: len(array) // length * length].reshape(-1, length)
        ids = torch.from_numpy(array.astype(np.int64))
        _check_ids(ids, path)
        return {"input_ids": ids}
    if array.dtype == np.uint8 and axes in (3, 4):
        return {"images": torch.from_numpy(np.array(array))}
    if kind == "f" and axes in (3, 4):
        pixels = torch.from_numpy(array.astype(np.float32))
        return {"pixel_values": pixels if axes == 4 else pixels.unsqueeze(1)}
    raise ValueError(
        f"{path} holds {array.dtype} of shape {list(array.shape)}; there may be whole numbers, "
        "(rows, tokens), or pixels: floats (rows, channels, height, width) as the model takes "
        "them, or bytes"
    )


def _with_labels(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Add the classes of pictures, where they lie beside them."""
    place = path.parent / LABELS
    if "input_ids" in tensors or place == path or not place.is_file():
        return tensors
    return {**tensors, "labels": labels_at(place, len(next(iter(tensors.values()))))}


def labels_at(place: Path, rows: int) -> Tensor:
    """Return the classes of so many rows."""
    array = _array(place)
    if array.dtype.kind not in "iu" or array.shape != (rows,):
        raise ValueError(
            f"{place} holds {array.dtype} of shape {list(array.shape)}; it must be one whole "
            f"number for each of {rows} rows"
        )
    return torch.from_numpy(array.astype(np.int64))
