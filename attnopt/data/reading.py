"""Data for a model: whatever a user gives becomes two halves, read with the model's own files."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.data.calls import batches_of, bounded, names_its_own, taken_by
from attnopt.data.sources import Source, checked
from attnopt.data.splitting import HELD_OUT, Split, halved, readable, split_of
from attnopt.untrusted import check_tokenizer, code_of, read_json


def split_for(program: Any, data: Any = None, held_out: int | None = None) -> Split:
    """Return the halves of data for a model.

    Data is a Source or its name, a Split, rows of a tensor, named rows, or an iterable of calls,
    which is read once. Without any it is the standard library.
    """
    if isinstance(data, Split):
        return data
    if data is None or isinstance(data, str | os.PathLike | Source):
        source = data if isinstance(data, Source) else Source.parse(str(data or Source()))
        return _read(program, source, held_out)
    _check_kind(data)
    if isinstance(data, Tensor):
        name = next(iter(next(batches_of(program, data[:1]))))
        return halved({name: data}, _whole("tensor", data), held_out)
    if isinstance(data, Mapping):
        first = next(v for v in data.values() if isinstance(v, Tensor))
        return halved(dict(data), _whole("tensors", first), held_out)
    return _of_calls(program, data)


def presented(data: Any, model: Any = None) -> Any:
    """Return data that `split_for` takes, as far as that can be told before a model is captured.

    A ValueError or TypeError says what is wrong with other data.
    """
    if data is None or isinstance(data, Split):
        return data
    if isinstance(data, str | os.PathLike | Source):
        source = data if isinstance(data, Source) else Source.parse(os.fspath(data))
        return readable(source, own=names_its_own(model))
    _check_kind(data)
    return data


def _check_kind(data: Any) -> None:
    if isinstance(data, Tensor) and (data.dim() < 2 or len(data) < 2):
        raise ValueError(
            f"the data has shape {list(data.shape)}; it must be at least two rows, such as "
            "(rows, tokens)"
        )
    if isinstance(data, Mapping) and not any(isinstance(v, Tensor) for v in data.values()):
        raise ValueError("the data names no tensor")
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be the name of a source, rows, or an iterable of calls, not "
            f"{type(data).__name__}"
        )


def held_out_of(program: Any, data: Any) -> tuple[Any, str, tuple[str, ...]]:
    """Return what to judge by, where it is from, and what has to be said of it.

    Of a source or a Split that is the held-out half; rows and calls are taken as they are.
    """
    if data is None or isinstance(data, str | os.PathLike | Source):
        data = split_for(program, data, HELD_OUT)
    if isinstance(data, Split):
        return data.held_out, data.source, data.notes
    return data, type(data).__name__, ()


def _whole(name: str, rows: Tensor) -> Source:
    return Source(name, rows=max(len(rows), 1))


def _read(program: Any, source: Source, held_out: int | None) -> Split:
    tokenizer = tokenizer_of(program) if checked(source).is_text else None
    processor = None if source.is_text else processor_of(program)
    own = names_its_own(program)
    return split_of(source, tokenizer, held_out=held_out, processor=processor, own=own)


def _of_calls(program: Any, data: Iterable[Any]) -> Split:
    """Hold out the last quarter of the calls of an iterable."""
    calls = list(batches_of(program, bounded(data), labels=True))
    if len(calls) == 1:
        return split_for(program, calls[0])
    if not calls:
        raise ValueError("the data is empty: a generator may have been read before")
    held = max(len(calls) // 4, 1)
    first, second = calls[:-held], [c for c in calls[-held:] if not _among(c, calls[:-held])]
    if not second:
        raise ValueError("every call held out is one to calibrate with as well")
    return Split(tuple(first), tuple(second), type(data).__name__, "")


def _among(call: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    return any(_same(call, other) for other in others)


def _same(call: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return call.keys() == other.keys() and all(
        torch.equal(v, other[n]) if isinstance(v, Tensor) else v == other[n]
        for n, v in call.items()
    )


def folder_of(program: Any) -> Path | None:
    """Return the directory of the checkpoint that a program or a module is from."""
    name = getattr(getattr(program, "config", None), "name_or_path", "")
    return Path(name) if name and (Path(name) / "config.json").is_file() else None


_TOKENIZES = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|.*\.(spm|tiktoken|model)$")
_PROBE = "a few plain words, 1 2 3"
_NO_TEXT = {
    "pixel_values": "a folder of images, or pixels as a .npy or .safetensors file",
    "input_values": "sounds as a .safetensors file with input_values",
    "input_features": "features of sounds as a .safetensors file with input_features",
}


def tokenizer_of(program: Any) -> Any:
    """Return the tokenizer that lies beside a program's checkpoint."""
    from transformers import AutoTokenizer

    folder = folder_of(program)
    if folder is None:
        taken = taken_by(program)
        what = "token ids as data: a tensor (rows, tokens) or a .safetensors file with input_ids"
        if taken and "input_ids" not in taken:
            what = f"what it takes as data: a .safetensors file of rows of {' and '.join(taken)}"
        raise ValueError(
            f"{_named(program)} was not captured from a directory, so it has no tokenizer; give "
            f"{what}"
        )
    _refuse_text(program)
    if not any(_TOKENIZES.match(p.name) for p in folder.iterdir()):
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json and its like); copy it there, or give "
            "token ids as data: a .safetensors file with input_ids"
        )
    try:
        check_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        # Without its files some classes make a tokenizer that knows no word.
        if set(known) <= set(tokenizer.all_special_ids):
            raise ValueError("it has no vocabulary")
    except (ValueError, OSError, KeyError) as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} has no usable tokenizer ({told}); give token ids as data: a "
            ".safetensors file with input_ids"
        ) from error
    return tokenizer


def _refuse_text(program: Any) -> None:
    """Raise ValueError where a model takes pixels or sounds, which no text becomes."""
    names = taken_by(program)
    other = next((n for n in _NO_TEXT if n in names), None)
    if other is not None and "input_ids" not in names:
        raise ValueError(f"{_named(program)} takes {other}, no text; give {_NO_TEXT[other]}")


def processor_of(program: Any) -> Any:
    """Return the image processor that lies beside a program's checkpoint; None without one."""
    folder = folder_of(program)
    place = None if folder is None else folder / "preprocessor_config.json"
    if place is None or not place.is_file():
        return None
    if code_of(read_json(place)):
        raise ValueError(f"{place} names code of its author's, which is not run")
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"{place} makes no image processor here: {told}") from error


def _named(program: Any) -> str:
    return str(getattr(program, "name", type(program).__name__))
