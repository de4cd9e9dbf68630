"""Documents of text: a name and a text each, from the standard library, folders and records."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from attnopt.data.sources import RECORDS, Source, files

SUFFIXES: Final = (".txt", ".md", ".py", ".rst", ".json", ".csv", ".html")
# Files of other lengths are no documents; texts of records are cut.
_SHORTEST, _LONGEST = 200, 200_000
_LARGEST_FILE: Final = 2**28
_LONGEST_LINE: Final = 2**24
# As much text as is read of one source: a calibration takes less than a hundredth.
_MOST_TEXT: Final = 2**28
_LARGEST_GROUP: Final = 2**31


def documents(source: Source) -> Iterator[tuple[str, str]]:
    """Yield the documents of a source with their names."""
    read = 0
    for name, text in _documents(source):
        yield name, text
        read += len(text)
        if read > _MOST_TEXT:
            return


def _documents(source: Source) -> Iterator[tuple[str, str]]:
    if source.name == "stdlib":
        yield from _standard_library()
    elif source.path.is_dir():
        yield from _folder(source)
    elif source.path.suffix.lower() in RECORDS:
        yield from _records(source.path, source.field)
    else:
        yield from _paragraphs(source.path)


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith("lib2to3/tests/data"):
            continue
        yield from _file(path, name)


def _folder(source: Source) -> Iterator[tuple[str, str]]:
    for path in files(source.path, (*SUFFIXES, *RECORDS)):
        if path.suffix.lower() in RECORDS:
            yield from _records(path, source.field)
        else:
            yield from _file(path, path.relative_to(source.path).as_posix())


def _file(path: Path, name: str) -> Iterator[tuple[str, str]]:
    if _SHORTEST <= path.stat().st_size <= _LONGEST:
        yield name, path.read_bytes().decode("utf-8", errors="replace")


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of a single file."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(
            f"{path} is larger than {_LARGEST_FILE >> 20} MiB; name a part of it, or make it .jsonl"
        )
    content = path.read_bytes()
    if b"\0" in content[:65536]:
        raise ValueError(
            f"{path} is not text; token ids and pixels are read from .npy and .safetensors"
        )
    text = content.decode("utf-8", errors="replace")
    yield from ((f"{path.name}#{i}", part) for i, part in enumerate(text.split("\n\n")) if part)


def _records(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of records; a text is its own name, so that it is in one half only."""
    rows = _lines(path) if path.suffix.lower() == ".jsonl" else _parquet(path, field)
    for where, record in rows:
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            known = ", ".join(map(str, record))[:80] if isinstance(record, dict) else "no fields"
            raise ValueError(
                f"{where} has no text in {field!r}; it has {known or 'no fields'}: name the field "
                f"as {path.name}#FIELD"
            )
        if text:
            yield digest(text.encode()), text[:_LONGEST]


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise ValueError(f"{path}:{number} is longer than {_LONGEST_LINE >> 20} MiB")
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs pyarrow to be read: pip install 'attnopt[parquet]', or make it .jsonl"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            if field not in known:
                yield str(path), dict.fromkeys(known)
                return
            _check_groups(path, file.metadata)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {field: text}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}") from error


def _check_groups(path: Path, metadata: Any) -> None:
    groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if max(groups, default=0) > _LARGEST_GROUP:
        raise ValueError(f"{path} has groups of rows of more than {_LARGEST_GROUP >> 30} GiB")


def digest(content: bytes) -> str:
    """Return what tells contents apart."""
    return hashlib.sha256(content).hexdigest()
