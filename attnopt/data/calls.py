"""Rows become calls of a model, each with its tensors by name."""

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor
from torch.nn import functional

from attnopt.data.arrays import MAIN
from attnopt.data.splitting import Split
from attnopt.program import Program

# One call holds about so many numbers where it is no text.
_NUMBERS: Final = 2**21
_MOST_BYTES: Final = 2**32
_LABELS: Final = "labels"


def batches_of(
    program: Any, data: Any, *, tokens: int = 4096, labels: bool = False
) -> Iterator[dict[str, Any]]:
    """Turn rows, or an iterable of rows or of named inputs, into calls of a program.

    An iterable is read once and needs no length. Labels are left out unless they are wanted, or the
    program takes them. Where they are not, an encoder-decoder that is given text alone reads the
    first half of each row, and goes on with the second.
    """
    names = taken_by(program)
    bound = _vocabulary(program)
    for call in _calls(names, data, tokens):
        kept = {n: v for n, v in call.items() if labels or n != _LABELS or n in names}
        _check_ids(kept, bound)
        if isinstance(program, Program) and not set(names) & set(kept):
            raise ValueError(
                f"the data has {', '.join(kept)}, and {program.name} takes {', '.join(names)}"
            )
        yield kept if labels else _decoding(program, names, kept)


def _decoding(program: Any, names: tuple[str, ...], call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of which an encoder-decoder has something to decode."""
    config, ids = getattr(program, "config", None), call.get("input_ids")
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(ids, Tensor):
        return call
    if set(call) & {"decoder_input_ids", "labels"} or "decoder_input_ids" not in names:
        return call
    half = max(ids.shape[1] // 2, 1)
    start = getattr(config, "decoder_start_token_id", None) or 0
    shifted = functional.pad(ids[:, half:-1], (1, 0), value=start)
    return {**{n: v[:, :half] for n, v in call.items()}, "decoder_input_ids": shifted}


def taken_by(program: Any) -> tuple[str, ...]:
    """Return the names of what a program or a module takes."""
    if isinstance(program, Program):
        parts = (program, *program.parts.values())
        found = (b.name for p in parts for b in p.bindings.values() if b.kind == "input")
        return tuple(dict.fromkeys(found))
    forward = getattr(program, "forward", program)
    return tuple(inspect.signature(forward).parameters) if callable(forward) else ()


def names_its_own(model: Any) -> bool:
    """Tell whether a model, or what is said in place of one, takes none of the usual inputs."""
    if isinstance(model, str | os.PathLike):
        place = os.fspath(model)
        return ":" in place or place.endswith(".pt2")
    return set(MAIN).isdisjoint(taken_by(model))


def bounded(data: Iterable[Any]) -> Iterator[Any]:
    """Yield the calls of an iterable; ValueError once they are more than can be held."""
    held = 0
    for call in data:
        tensors = call.values() if isinstance(call, Mapping) else (call,)
        held += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        if held > _MOST_BYTES:
            raise ValueError(
                f"the data is more than {_MOST_BYTES >> 30} GiB; take a part of it, such as with "
                "itertools.islice"
            )
        yield call


def _calls(names: tuple[str, ...], data: Any, tokens: int) -> Iterator[dict[str, Any]]:
    if isinstance(data, Split):
        data = data.calibration
    if isinstance(data, str | os.PathLike):
        raise TypeError("name a source with attnopt.data.split_of, which needs a tokenizer")
    if isinstance(data, Tensor):
        rows = data.unsqueeze(0) if data.dim() == 1 else data
        yield from _pieces({_main(names, rows): rows}, tokens)
    elif isinstance(data, Mapping):
        yield from _pieces(data, tokens)
    elif isinstance(data, Iterable):
        for call in bounded(data):
            yield _named(names, call)
    else:
        raise TypeError(
            f"data must be rows of a tensor or an iterable of calls, not {type(data).__name__}"
        )


def _named(names: tuple[str, ...], call: Any) -> dict[str, Any]:
    """Return one call of an iterable: named inputs, or the rows of the main one."""
    if isinstance(call, Mapping):
        return dict(call)
    if not isinstance(call, Tensor):
        raise TypeError(
            f"the data holds a {type(call).__name__}; each item is a tensor, or a mapping of the "
            "names of inputs to tensors"
        )
    rows = call.unsqueeze(0) if call.dim() == 1 else call
    return {_main(names, rows): rows}


def _main(names: tuple[str, ...], rows: Tensor) -> str:
    """Return what a tensor alone stands for."""
    if not rows.is_floating_point():
        return "input_ids"
    wanted: str | None = next((n for n in MAIN[1:] if n in names), None)
    if wanted is None and len(names) == 1:
        wanted = names[0]
    if wanted is None:
        raise ValueError(
            f"rows of {rows.dtype} are no token ids; name them, as one of {', '.join(names)}"
        )
    return wanted


def _pieces(call: Mapping[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
    """Cut the rows that all tensors of a call have in common."""
    tensors = [v for v in call.values() if isinstance(v, Tensor)]
    counts = {len(t) if t.dim() else 0 for t in tensors}
    if len(counts) != 1 or len(tensors) != len(call):
        yield dict(call)
        return
    count = counts.pop()
    size = _rows_at_once(call, tokens)
    for start in range(0, count, size):
        yield {name: v[start : start + size] for name, v in call.items()}


def _rows_at_once(call: Mapping[str, Tensor], tokens: int) -> int:
    ids = call.get("input_ids")
    if ids is not None and ids.dim() > 1:
        return max(tokens // max(ids.shape[1], 1), 1)
    widest = max(v[0].numel() if len(v) else 1 for v in call.values())
    return max(_NUMBERS // max(widest, 1), 1)


def _vocabulary(program: Any) -> int | None:
    config: Any = getattr(program, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _check_ids(call: Mapping[str, Any], vocabulary: int | None) -> None:
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        return
    if ids.is_floating_point():
        raise ValueError(f"input_ids must be whole numbers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ValueError(
            f"input_ids has {low if low < 0 else high}, but the model knows the tokens 0 to "
            f"{vocabulary - 1 if vocabulary else 'some largest one'}: it was tokenized for another"
        )
