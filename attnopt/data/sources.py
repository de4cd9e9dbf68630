"""Where data comes from, as it is named: `NAME[#FIELD][:COUNTxLENGTH]`.

`stdlib`, the Python library of this interpreter, which every machine has and which is nobody's
domain; a folder or file of text; `.jsonl` and `.parquet`, whose field `text`, or the one after `#`,
is read; token ids or pixels in `.safetensors` or `.npy`; a folder of images. Whoever made the
files is not trusted: no pickle is opened, no link out of a folder is followed, sizes are bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

STDLIB = "Python's own standard library, not text of the model's use"
RECORDS = (".jsonl", ".parquet")
ARRAYS = (".safetensors", ".npy")
IMAGES = (".png", ".jpg", ".jpeg")
# What is opened by running it, and archives.
_PICKLES = (
    *(".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npz"),
    *(".h5", ".zip", ".tar", ".gz", ".arrow"),
)
_FIELD = "text"
MOST_FILES = 200_000


@dataclass(frozen=True)
class Source:
    """Where data comes from, and how many rows of how many tokens are taken of it."""

    name: str = "stdlib"
    rows: int = 48
    length: int = 256
    seed: int = 0
    field: str = _FIELD

    def __str__(self) -> str:
        field = "" if self.field == _FIELD else f"#{self.field}"
        return f"{self.name}{field}:{self.rows}x{self.length}"

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.name)

    @property
    def kind(self) -> Literal["text", "arrays", "images"]:
        """What it holds: text, arrays of ids or pixels, or image files."""
        if self.name == "stdlib":
            return "text"
        if self.path.suffix.lower() in ARRAYS:
            return "arrays"
        if self.path.is_dir() and next(files(self.path, IMAGES), None) is not None:
            return "images"
        return "text"

    @property
    def is_text(self) -> bool:
        """Whether a tokenizer is needed to read it."""
        return self.kind == "text"

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> "Source":
        """Read `NAME[#FIELD][:COUNTxLENGTH]`."""
        name, _, size = text.rpartition(":")
        count, cross, length = size.partition("x")
        if not (name and cross and count.isdecimal() and length.isdecimal()):
            named, field = _name(text)
            return cls(named, seed=seed, field=field)
        if int(count) < 1 or int(length) < 2:
            raise ValueError(f"data {text!r}: at least one row of two tokens, such as :48x256")
        named, field = _name(name)
        return cls(named, int(count), int(length), seed, field)


def _name(text: str) -> tuple[str, str]:
    """Take the field off a name of records."""
    name, _, field = text.rpartition("#")
    return (name, field) if field and name.lower().endswith(RECORDS) else (text, _FIELD)


def checked(source: Source) -> Source:
    """Return a source that is there; raise ValueError for one that is not, or is not opened."""
    path = source.path
    if source.name == "stdlib":
        return source
    if not path.exists():
        raise ValueError(
            f"data {source.name!r}: no such file or folder; 'stdlib' is Python's own library"
        )
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"data {source.name!r} is an archive or a pickle, which can run code, and is not "
            "opened; save arrays as .npy or .safetensors, and text as .jsonl"
        )
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"data {source.name!r} is neither a regular file nor a folder")
    return source


def files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below a folder, sorted; those that links lead out of it to are left out."""
    home = root.resolve()
    found = list(islice(root.rglob("*"), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise ValueError(f"{root} holds more than {MOST_FILES:,} files; name a part of it")
    for path in sorted(found):
        if path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if path.resolve().is_relative_to(home):
            yield path
