"""A delta and its base as the artifact that they were made from, bit by bit."""

import json
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from attnopt.artifacts.delta import CONTENT, FILES, Base, Shard, free_place, is_ours
from attnopt.artifacts.loading import artifact_at, checked, is_delta, refuse_code
from attnopt.artifacts.manifest import (
    FOLDER,
    NAME,
    IntegrityError,
    check_manifest,
    listed_files,
)
from attnopt.artifacts.spans import Header, spans_of
from attnopt.artifacts.staging import staged

_LARGEST = 2**28
# Tensors of a base may stand in an artifact more than once; this bounds what a delta can claim.
_TIMES = 2


def restore(
    delta: str | os.PathLike[str], base: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Path:
    """Write the artifact that a delta was made from, bit by bit; IntegrityError on another base."""
    root = artifact_at(delta)
    config = checked(root, strict=True)
    if not is_delta(config):
        raise ValueError(f"{root} is no delta: it is whole as it is")
    source = Base.open(base)
    target = free_place(out, root, source.path)
    with staged(target) as staging:
        _rebuild(root, source, staging)
    return target


@contextmanager
def restored(root: Path, base: str | os.PathLike[str]) -> Generator[Path]:
    """Yield the artifact of a checked delta, in a directory that is removed afterwards."""
    with TemporaryDirectory(prefix="attnopt-", ignore_cleanup_errors=True) as folder:
        whole = Path(folder) / "artifact"
        whole.mkdir()
        _rebuild(root, Base.open(base), whole)
        yield whole


def _rebuild(root: Path, base: Base, whole: Path) -> None:
    """Put a checked delta and its base together in an empty directory, and check the result."""
    try:
        content = _read(root)
        shards = {n: _stored_shard(root, n, told) for n, told in content["weights"].items()}
        hashes = {str(n): str(sha256) for n, sha256 in content["base"]["sha256"].items()}
        made_from = str(content["base"]["name"])[:80]
        listed = listed_files(root / FILES)
        _refuse_unsafe(listed)
        _refuse_excess(base, shards)
        if not shards.keys() <= listed.keys():
            raise ValueError("a weight file that its manifest does not list")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{root / CONTENT} is broken: {error}") from error
    for name, shard in shards.items():
        for stored in shard.from_base.values():
            _refuse_missing(base, stored, hashes, made_from)
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        _join(whole / name, shard, base, hashes, made_from)
    for name, entry in listed.items():
        if name not in shards:
            _bring(root, base, whole, name, entry["sha256"], made_from)
    (whole / FOLDER).mkdir(exist_ok=True)
    shutil.copyfile(root / FILES / NAME, whole / NAME)
    refuse_code(whole)
    check_manifest(whole)


def _read(root: Path) -> dict[str, Any]:
    place = root / CONTENT
    if not place.is_file() or place.stat().st_size > _LARGEST:
        raise ValueError("not there, or larger than any description of a delta")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or content.get("schema") != "attnopt.delta/1":
        raise ValueError("its schema is not attnopt.delta/1")
    return content


def _stored_shard(root: Path, file: str, told: Mapping[str, Any]) -> Shard:
    """Read how a weight file is put together; ValueError where a tensor comes from nowhere."""
    header = Header.parse(told["header"])
    shard, own = told["shard"], {}
    if shard is not None:
        if not is_ours(shard):
            raise ValueError(f"{str(shard)[:80]!r} is no weight file of a delta")
        own = spans_of(root / shard)
    found = Shard(file, header, own, {str(k): str(v) for k, v in told["from_base"].items()})
    for name in found.own:
        if name not in own:
            raise ValueError(f"{root / str(shard)} has no tensor {name[:80]!r}")
        if own[name].size != header.sizes[name]:
            raise ValueError(f"tensor {name[:80]!r} has another size than its header says")
    return found


def _refuse_unsafe(names: Iterable[str]) -> None:
    for name in names:
        path = PurePosixPath(name)
        plain = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
        if not plain or not path.name or any(c in name for c in "\\:\0"):
            raise ValueError(f"{name[:80]!r} is no path inside an artifact")


def _refuse_excess(base: Base, shards: Mapping[str, Shard]) -> None:
    """Refuse weights that are larger than base and delta can account for."""
    there = {(s.path, s.start): s.size for s in base.tensors.values()}
    there |= {(s.path, s.start): s.size for sh in shards.values() for s in sh.spans.values()}
    claimed = sum(sum(shard.header.sizes.values()) for shard in shards.values())
    if claimed > _TIMES * sum(there.values()):
        raise ValueError(f"it claims {claimed:,} bytes of weights, more than base and delta hold")


def _refuse_missing(base: Base, name: str, hashes: Mapping[str, str], made_from: str) -> None:
    if name not in hashes:
        raise IntegrityError(f"the delta takes {name[:80]!r} from its base without naming its hash")
    if name not in base.tensors:
        raise _other_base(base, f"has no tensor {name[:80]}", made_from)


def _join(path: Path, shard: Shard, base: Base, hashes: Mapping[str, str], made_from: str) -> None:
    """Write a weight file from the tensors of the base and those of the delta."""
    with path.open("wb") as file:
        shard.header.write(file)
        for name, size in shard.header.sizes.items():
            stored = shard.from_base.get(name)
            span = shard.spans[name] if stored is None else base.tensors[stored]
            if stored is None:
                span.copy(file)
            elif span.size != size or span.copy(file) != hashes[stored]:
                raise _other_base(base, f"has another tensor {stored[:80]}", made_from)


def _bring(root: Path, base: Base, whole: Path, name: str, sha256: object, made_from: str) -> None:
    """Copy a file that is no weight file, from the delta or else from the base."""
    place = root / FILES / name
    if not place.is_file():
        place = base.path / name
        if not base.same_file(name, sha256):
            raise _other_base(base, f"has not the file {name[:80]}", made_from)
    (whole / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(place, whole / name)


def _other_base(base: Base, what: str, made_from: str) -> IntegrityError:
    return IntegrityError(
        f"{base.path} {what} of which the delta was made (sha256); "
        f"give as base the {made_from!r} that it was made from, unchanged"
    )
