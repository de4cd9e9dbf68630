"""A delta: what an artifact has and its base has not; `restoring` puts the two together again.

Tensors are compared as bytes, whatever tier the artifact has. The base is known by the sha256 of
each of its tensors. No weights lie where a stock loader looks for them, and the model type is that
of no model: whoever loads a delta as it is gets an error instead of a model.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.artifacts.loading import DELTA, DELTA_TYPE, artifact_at, checked, is_delta
from attnopt.artifacts.manifest import (
    FOLDER,
    digest,
    listed_files,
    write_listed,
    write_manifest,
)
from attnopt.artifacts.programs import tensor_places
from attnopt.artifacts.saving import refuse_foreign
from attnopt.artifacts.spans import Header, Span, spans_of
from attnopt.artifacts.staging import staged

CONTENT = f"{FOLDER}/delta.json"
FILES = f"{FOLDER}/files"
STATISTICS = f"{FOLDER}/statistics.safetensors"


@dataclass(frozen=True)
class Delta:
    """What was written where, and the tensors in which the artifact differs from its base."""

    path: Path
    base: str
    equal: int
    changed: tuple[str, ...]
    new: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    artifact_bytes: int
    delta_bytes: int

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {k: v for k, v in vars(self).items() if k != "path"}


@dataclass(frozen=True)
class Base:
    """The tensors of a base checkpoint, as bytes."""

    path: Path
    name: str
    tensors: Mapping[str, Span]

    @classmethod
    def open(cls, place: str | os.PathLike[str]) -> "Base":
        """Read where the tensors of a checkpoint are; ValueError where it is none."""
        path = Path(place).absolute()
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no checkpoint to start from: it has no config.json")
        places = tensor_places(path)
        if not places:
            raise ValueError(f"{path} has no weights to start from (no safetensors file)")
        files = {file: spans_of(file) for file in {file for file, _ in places.values()}}
        return cls(path, _name_of(path), {n: files[f][stored] for n, (f, stored) in places.items()})

    def same_file(self, name: str, sha256: object) -> bool:
        """Tell whether the base has a file with these bytes."""
        place = self.path / name
        return "/" not in name and place.is_file() and digest(place) == sha256


@dataclass(frozen=True)
class Shard:
    """A weight file of the artifact: its header, what the base has of it, and what it has not."""

    file: str
    header: Header
    spans: Mapping[str, Span]
    from_base: Mapping[str, str]

    @property
    def own(self) -> tuple[str, ...]:
        """The tensors that the base does not have."""
        return tuple(n for n in self.header.sizes if n not in self.from_base)


def export_delta(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    statistics: bool = False,
) -> Delta:
    """Write what of an artifact its base does not have; ValueError where that would be all.

    Without `base`, it is what the command that made the artifact names. The statistics of the plan,
    which only a replay of it reads, are left out unless asked for.
    """
    root = artifact_at(artifact)
    config = checked(root, strict=True)
    if is_delta(config):
        raise ValueError(f"{root} is a delta already; give the whole artifact")
    source = Base.open(_source_of(root) if base is None else base)
    target = free_place(out, root, source.path)
    listed = listed_files(root)
    left_out = () if statistics else tuple(n for n in (STATISTICS,) if n in listed)
    kept = {name: entry for name, entry in listed.items() if name not in left_out}
    hashes = {name: span.digest() for name, span in source.tensors.items()}
    shards = [_compared(root, n, hashes) for n in sorted(kept) if _holds_weights(n)]
    if not any(shard.from_base for shard in shards):
        raise ValueError(
            f"{root} has no tensor of {source.path}: give as base what it was made from"
        )
    with staged(target) as staging:
        (staging / FILES / FOLDER).mkdir(parents=True)
        others = [name for name in kept if not _holds_weights(name)]
        _copy_files(root, staging / FILES, source, {name: kept[name] for name in others})
        write_listed(staging / FILES, kept)
        content = {
            "schema": "attnopt.delta/1",
            "base": {"name": source.name, "sha256": hashes},
            "weights": _write_shards(staging, shards),
        }
        _write_json(staging / CONTENT, content)
        _write_json(staging / "config.json", _config(source.name, config))
        (staging / "README.md").write_text(_card(source.name), encoding="utf-8")
        write_manifest(staging)
    return _told(target, source, shards, left_out)


def free_place(out: str | os.PathLike[str], *sources: Path) -> Path:
    """Return the target, which must not be, hold or lie in what is read."""
    target = Path(out).absolute()
    for source in sources:
        a, b = target.resolve(), source.resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            raise ValueError(f"{target} and {source}, which is read, overlap; choose another place")
    refuse_foreign(target)
    return target


def _source_of(root: Path) -> Path:
    """Return the directory that the command of an artifact names, if it is here."""
    told = root / FOLDER / "env.json"
    made = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    base, words = made.get("base"), shlex.split(made.get("command") or "")
    if words[:2] == ["attnopt", "optimize"] and len(words) > 2:
        place = Path(words[2]).expanduser()
        if place.resolve().name == base and (place / "config.json").is_file():
            return place
    known = f", which it calls {base!r}" if base else ""
    raise ValueError(f"{root} does not say where its base is{known}: give it with --base DIR")


def _name_of(path: Path) -> str:
    """Return the name of a checkpoint; in a cache of the hub, that of its repository and commit."""
    *_, repository, folder, name = (*("",) * 3, *path.resolve().parts)
    if folder == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{name}"
    return name


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name != STATISTICS


def _compared(root: Path, file: str, hashes: Mapping[str, str]) -> Shard:
    """Find the tensors of a file in the base: by name first, then by what they hold."""
    header = Header.of(root / file)
    spans = header.spans(root / file)
    names = {sha256: name for name, sha256 in reversed(list(hashes.items()))}
    found: dict[str, str] = {}
    for name, span in spans.items():
        sha256 = span.digest()
        if hashes.get(name) == sha256:
            found[name] = name
        elif sha256 in names:
            found[name] = names[sha256]
    return Shard(file, header, spans, found)


def _copy_files(
    root: Path, folder: Path, base: Base, files: Mapping[str, Mapping[str, object]]
) -> None:
    """Copy what is no weight file, except what the base has as it is."""
    for name, entry in files.items():
        if not base.same_file(name, entry["sha256"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)


def _write_shards(staging: Path, shards: Iterable[Shard]) -> dict[str, Any]:
    """Write the tensors that the base lacks; return how each weight file is put together."""
    content: dict[str, Any] = {}
    for number, shard in enumerate(shards, 1):
        if shard.own:
            with (staging / _file(number)).open("wb") as file:
                shard.header.only(shard.own).write(file)
                for name in shard.own:
                    shard.spans[name].copy(file)
        content[shard.file] = {
            "header": shard.header.text,
            "shard": _file(number) if shard.own else None,
            "from_base": dict(shard.from_base),
        }
    return content


def _file(number: int) -> str:
    return f"{FOLDER}/delta-{number:05}.safetensors"


def _config(base: str, config: Mapping[str, Any]) -> dict[str, Any]:
    block = {**config["attnopt"], "must_understand": list(DELTA)}
    return {"model_type": DELTA_TYPE, "base": base, "attnopt": block}


def _card(base: str) -> str:
    lines = (
        "---",
        f"base_model: {base.partition('@')[0]}",
        "tags:",
        "- attnopt",
        "---",
        "",
        f"# A delta to {base}",
        "",
        "This is no model: it holds only the tensors in which one differs from its base. Put the",
        "two together with attnopt:",
        "",
        "```",
        "attnopt export path/of/this/directory --to full --base path/of/the/base -o whole",
        "```",
        "",
        'or in Python: `attnopt.load("path/of/this/directory", base="path/of/the/base")`.',
        "",
        f"The card, the plan and the report of the model are in `{FILES}`.",
    )
    return "\n".join(lines) + "\n"


def _told(target: Path, base: Base, shards: Iterable[Shard], left_out: tuple[str, ...]) -> Delta:
    own = [name for shard in shards for name in shard.own]
    names = {name for shard in shards for name in shard.header.sizes}
    whole = sum(e["size"] for e in listed_files(target / FILES).values())  # type: ignore[misc]
    return Delta(
        path=target,
        base=base.name,
        equal=sum(len(shard.from_base) for shard in shards),
        changed=tuple(n for n in own if n in base.tensors),
        new=tuple(n for n in own if n not in base.tensors),
        removed=tuple(sorted(set(base.tensors) - names)),
        left_out=left_out,
        artifact_bytes=int(whole),
        delta_bytes=sum(p.stat().st_size for p in target.rglob("*") if p.is_file()),
    )


def is_ours(file: Any) -> bool:
    """Tell whether a name is that of a weight file of a delta."""
    number = str(file).removeprefix(f"{FOLDER}/delta-").removesuffix(".safetensors")
    return number.isdecimal() and file == _file(int(number))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
