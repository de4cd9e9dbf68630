"""Two halves that share no document: one to calibrate with, one to judge by.

Documents are dealt by a hash of their name, one in twenty to the held-out half, so that a file is
never in both, whatever the order or the count; a text of two names is held out
where one is.
Rows of arrays are documents of their own: the last ones are held out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.data.arrays import stored
from attnopt.data.documents import digest, documents
from attnopt.data.pictures import pictures, pixels_of
from attnopt.data.sources import STDLIB, Source, checked

Rows = Tensor | Mapping[str, Tensor] | tuple[Mapping[str, Any], ...]
HELD_OUT = 96
SCORING = 32
_DOCUMENTS_OF_A_ROW = 2
_HELD_OUT_OF = 20
# More than a token has, so that a piece of a text has the tokens that are wanted.
_CHARACTERS = 8
_PICTURES_HELD_OUT_OF = 4


@dataclass(frozen=True)
class Split:
    """Rows to calibrate with, and others to judge by: token ids, or tensors by their names.

    `scoring` are rows of the half to calibrate with that nothing is solved on, to choose by.
    """

    calibration: Rows
    held_out: Rows
    source: str
    digest: str
    documents: int | None = None
    scoring: Rows | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said of the data wherever results are; `documents` are those held out."""
        found = []
        if self.source.partition(":")[0] == "stdlib":
            found.append(f"judged on {STDLIB}")
        if self.documents is not None and 3 * self.documents < len(self.held_out):
            found.append(
                f"the {len(self.held_out)} held-out rows are of {self.documents} documents only: "
                "others may differ by more than the interval says"
            )
        return tuple(found)


def split_of(
    source: Source,
    tokenizer: Any = None,
    *,
    held_out: int | None = None,
    processor: Any = None,
    own: bool = False,
) -> Split:
    """Read a source and cut both halves into rows.

    Text needs the model's tokenizer; `processor` makes pixel values of pictures; a model may have
    names of its `own` for arrays.
    """
    checked(source)
    if source.kind == "arrays":
        return halved(_arrays(source, processor, own=own), source, held_out)
    if source.kind == "images":
        return _dealt(source, held_out, processor)
    calibration, held = _documents(source)
    rows = source.rows if held_out is None else held_out
    first, _ = _spread(calibration, tokenizer, source.rows, source.length, source.seed)
    second, used = _spread(held, tokenizer, rows, source.length)
    told = _digest({"ids": first}, {"ids": second})
    return Split(
        first, second, str(source), told, used, _unused(calibration, first, source, tokenizer)
    )


def readable(source: Source, *, own: bool = False) -> Source:
    """Return a source that can be opened, as far as that takes no model; ValueError for others."""
    checked(source)
    if source.kind == "arrays":
        stored(source.path, source.length, own=own)
    elif source.is_text and source.name != "stdlib" and next(documents(source), None) is None:
        raise ValueError(f"data {source.name!r} holds no text that could be read")
    return source


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


def _spread(
    documents: Sequence[str], tokenizer: Any, rows: int, length: int, seed: int = 0
) -> tuple[Tensor, int | None]:
    """Cut rows from as many documents as there are, and return how many those are.

    Rows of one document are alike: an interval that takes them for independent is too narrow, and
    moments of a few files serve no others. Each document gives as many rows from somewhere inside
    it; where that is too little, all is cut.
    """
    random, found, used = torch.Generator().manual_seed(seed), list[Tensor](), 0
    order: list[int] = torch.randperm(len(documents), generator=random).tolist()
    for left, index in zip(range(len(order), 0, -1), order, strict=True):
        share = -(-(rows - len(found)) // left)
        piece = _piece(documents[index], share * length * _CHARACTERS, random)
        ids = _tokens(piece, tokenizer)
        count = min(len(ids) // length, share)
        found.extend(torch.tensor(ids[: count * length]).view(-1, length))
        used += count > 0
    if len(found) < rows:
        return cut(documents, tokenizer, rows=rows, length=length, seed=seed), None
    return torch.stack(found), used


def _unused(
    documents: Sequence[str], used: Tensor, source: Source, tokenizer: Any
) -> Tensor | None:
    """Cut rows from documents that none of the used ones are from; None where those are few."""
    seed = source.seed
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    # The first of this order have been used, one a row, but for those that are too short.
    left: list[str] = [documents[int(i)] for i in order[_DOCUMENTS_OF_A_ROW * len(used) :]]
    if len(left) < SCORING:
        return None
    rows, _ = _spread(left, tokenizer, SCORING, source.length, seed)
    seen = {row.numpy().tobytes() for row in used}
    fresh = [row for row in rows if row.numpy().tobytes() not in seen]
    return torch.stack(fresh) if len(fresh) >= SCORING // 2 else None


def _piece(text: str, size: int, random: torch.Generator) -> str:
    """Return so much of a text, from the start of a line that is drawn."""
    room = len(text) - size
    if room <= 0:
        return text
    start = int(torch.randint(room, (), generator=random))
    line = text.find("\n", start) + 1
    return text[line : line + size] if 0 < line <= room else text[start : start + size]


def _tokens(text: str, tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*before, *found, *after]


def _documents(source: Source) -> tuple[list[str], list[str]]:
    """Read the documents of both halves."""
    halves: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, text in documents(source):
        halves[is_held_out(name)].setdefault(digest(text.encode()), text)
    for twin in halves[0].keys() & halves[1].keys():
        del halves[0][twin]
    if not halves[0] or not halves[1]:
        raise ValueError(
            f"data {source.name!r} has {len(halves[0])} documents to calibrate with and "
            f"{len(halves[1])} held out; both halves need one (a file of lines is cut by "
            "paragraphs)"
        )
    return list(halves[0].values()), list(halves[1].values())


def is_held_out(name: str, of: int = _HELD_OUT_OF) -> bool:
    """Tell whether a document of this name is held out: one in so many is."""
    return int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % of == 0


def halved(tensors: Mapping[str, Tensor], source: Source, held_out: int | None) -> Split:
    """Hold out the last rows, at most a quarter; rows that are in both halves count once."""
    count = len(next(iter(tensors.values())))
    if count < 2:
        raise ValueError(f"{source.name} must hold at least two rows, one of them to judge by")
    held = max(min(held_out or HELD_OUT, count // 4), 1)
    first = {n: t[: min(count - held, source.rows)].clone() for n, t in tensors.items()}
    second = _apart(first, {n: t[count - held :].clone() for n, t in tensors.items()})
    return made(first, second, source.name)


def made(first: dict[str, Tensor], second: dict[str, Tensor], source: str) -> Split:
    """Return the split of named rows; ids alone are the tensor itself."""
    if not len(next(iter(second.values()))):
        raise ValueError(f"{source}: every row held out is one to calibrate with as well")
    told = _digest(first, second)
    if list(first) == ["input_ids"]:
        return Split(first["input_ids"], second["input_ids"], source, told)
    return Split(first, second, source, told)


def _apart(first: Mapping[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the rows of the second half that the first has, too."""
    seen = set(_prints(first))
    kept = torch.tensor([p not in seen for p in _prints(second)], dtype=torch.bool)
    return second if bool(kept.all()) else {name: t[kept] for name, t in second.items()}


def _prints(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what tells the rows apart: everything that a model is given."""
    given = [t for name, t in tensors.items() if name != "labels"]
    return [
        digest(b"".join(t[i].contiguous().numpy().tobytes() for t in given))
        for i in range(len(given[0]))
    ]


def _dealt(source: Source, held_out: int | None, processor: Any) -> Split:
    """Deal the pictures of a folder to the halves."""
    count = HELD_OUT if held_out is None else held_out
    wanted: Callable[[str], bool] = lambda name: is_held_out(name, _PICTURES_HELD_OUT_OF)  # noqa: E731
    first = pictures(source.path, processor, lambda n: not wanted(n), source.rows)
    second = pictures(source.path, processor, wanted, count)
    if not first or not second:
        raise ValueError(
            f"data {source.name!r} has too few images: both halves need one (one in "
            f"{_PICTURES_HELD_OUT_OF} is held out, by its name)"
        )
    return made(first, _apart(first, second), source.name)


def _arrays(source: Source, processor: Any, *, own: bool) -> dict[str, Tensor]:
    arrays = stored(source.path, source.length, own=own)
    images = arrays.pop("images", None)
    return arrays if images is None else {"pixel_values": pixels_of(images, processor), **arrays}


def _digest(*halves: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in (t for half in halves for t in half.values()):
        whole.update(str(tuple(tensor.shape)).encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()
