"""Text for calibration and for the held-out comparison, as rows of tokens.

A source is named `NAME[:COUNTxLENGTH]`: `stdlib`, the Python library of this interpreter, which
every machine has; a folder or file of text; or a `.safetensors` file with `input_ids`. Documents
are dealt to the two halves by a hash of their name, one in twenty to the held-out half, so that a
file is never in both, whatever the order or the count.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.program import Program

SUFFIXES = (".txt", ".md", ".py", ".rst", ".json", ".jsonl", ".csv", ".html")
_HELD_OUT_OF = 20
_LONGEST = 200_000


@dataclass(frozen=True)
class Source:
    """Where text comes from, and how many rows of how many tokens are taken of it."""

    name: str = "stdlib"
    rows: int = 48
    length: int = 256
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.rows}x{self.length}"

    @property
    def is_text(self) -> bool:
        """Whether a tokenizer is needed to read it."""
        return not self.name.endswith(".safetensors")

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> "Source":
        """Read `NAME[:COUNTxLENGTH]`."""
        name, _, size = text.rpartition(":")
        if not name:
            return cls(text, seed=seed)
        count, cross, length = size.partition("x")
        if not (cross and count.isdecimal() and length.isdecimal()):
            return cls(text, seed=seed)
        if int(count) < 1 or int(length) < 2:
            raise ValueError(f"data {text!r}: at least one row of two tokens, such as :48x256")
        return cls(name, int(count), int(length), seed)


@dataclass(frozen=True)
class Split:
    """Rows of token ids to calibrate with, and others to judge by."""

    calibration: Tensor
    held_out: Tensor
    source: str
    digest: str


def checked(source: Source) -> Source:
    """Return a source that is there; raise ValueError for one that is not."""
    if source.name != "stdlib" and not Path(source.name).exists():
        raise ValueError(
            f"data {source.name!r}: no such file or folder; 'stdlib' is Python's own library"
        )
    return source


def split_of(source: Source, tokenizer: Any, *, held_out: int | None = None) -> Split:
    """Tokenize a source and cut both halves into rows."""
    checked(source)
    if not source.is_text:
        return _stored(source)
    calibration, held = _documents(source)
    rows = source.rows if held_out is None else held_out
    first = cut(calibration, tokenizer, rows=source.rows, length=source.length, seed=source.seed)
    second = cut(held, tokenizer, rows=rows, length=source.length, seed=0)
    return Split(first, second, str(source), _digest(first, second))


def cut(documents: Sequence[str], tokenizer: Any, *, rows: int, length: int, seed: int) -> Tensor:
    """Tokenize documents in an order drawn from the seed, and cut the stream into rows."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    stream: list[int] = []
    for index in range(len(documents)):
        stream.extend(_tokens(documents[int(order[index])], tokenizer))
        if len(stream) >= rows * length:
            break
    whole = len(stream) // length
    if whole == 0:
        raise ValueError(f"the text has {len(stream)} tokens, less than one row of {length}")
    return torch.tensor(stream[: min(rows, whole) * length]).view(-1, length)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*before, *found, *after]


def _documents(source: Source) -> tuple[list[str], list[str]]:
    """Read the documents of both halves."""
    halves: tuple[list[str], list[str]] = ([], [])
    for name, text in _texts(source.name):
        halves[_is_held_out(name)].append(text)
    if not halves[0] or not halves[1]:
        raise ValueError(
            f"data {source.name!r} has {len(halves[0])} documents to calibrate with and "
            f"{len(halves[1])} held out; both halves need one (a file of lines is cut by "
            "paragraphs)"
        )
    return halves


def _is_held_out(name: str) -> bool:
    return (
        int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % _HELD_OUT_OF == 0
    )


def _texts(name: str) -> Iterator[tuple[str, str]]:
    if name == "stdlib":
        yield from _standard_library()
        return
    path = Path(name)
    if path.is_dir():
        yield from _folder(path)
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from ((f"{path.name}#{i}", part) for i, part in enumerate(text.split("\n\n")) if part)


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith("lib2to3/tests/data"):
            continue
        yield from _read(path, name)


def _folder(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            yield from _read(path, path.relative_to(root).as_posix())


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    text = path.read_bytes()
    if 200 <= len(text) <= _LONGEST:
        yield name, text.decode("utf-8", errors="replace")


def _stored(source: Source) -> Split:
    """Read rows of token ids; the last twentieth, and at least one row, is held out."""
    from safetensors.torch import load_file

    ids = load_file(source.name).get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) < 2 or ids.is_floating_point():
        raise ValueError(f"{source.name} must hold 'input_ids', at least two rows of whole numbers")
    held = max(len(ids) // _HELD_OUT_OF, 1)
    first, second = ids[:-held][: source.rows].long(), ids[-held:].long()
    return Split(first, second, source.name, _digest(first, second))


def _digest(*tensors: Tensor) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(str(tuple(tensor.shape)).encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def batches_of(program: Program, data: Any, *, tokens: int = 4096) -> Iterator[dict[str, Any]]:
    """Turn rows of ids, or an iterable of ids or of named inputs, into calls of a program."""
    if isinstance(data, Split):
        data = data.calibration
    if isinstance(data, str | os.PathLike):
        raise TypeError("name a source with attnopt.data.split_of, which needs a tokenizer")
    if isinstance(data, Tensor):
        rows = data if data.dim() == 2 else data.unsqueeze(0)
        size = max(tokens // rows.shape[1], 1)
        yield from ({"input_ids": part} for part in rows.split(size))
        return
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be token ids or an iterable of calls, not {type(data).__name__}"
        )
    for call in data:
        yield dict(call) if isinstance(call, Mapping) else {"input_ids": torch.atleast_2d(call)}
