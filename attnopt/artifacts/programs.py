"""Tier 2: a directory that holds the program itself, for what no stock class can express.

No weights lie where a stock loader looks for them, and the model type is attnopt's own: whoever
loads the directory without attnopt is told so instead of running something else.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.artifacts.manifest import FOLDER, IntegrityError
from attnopt.frontend.checkpoints import holds_program, stored_tensors
from attnopt.lowering import kinds_of, learns, weight_named
from attnopt.perlayer import MARK
from attnopt.program import Program
from attnopt.stored import read_program, write_program
from attnopt.untrusted import read_json

UNDERSTANDS = ("program",)
NAME = f"{FOLDER}/program.json"
SHARD = 5 * 10**9
_FORGOTTEN = ("auto_map", "_name_or_path", "name_or_path", MARK)


def write_stored(program: Program, root: Path, *, shard: int = SHARD) -> None:
    """Write config.json, the program and its weights; ValueError where it cannot be stored."""
    content = write_program(program)
    (root / FOLDER).mkdir(exist_ok=True)
    _write_json(root / "config.json", _config_of(program))
    content["weights"] = dict(_write_weights(program, root, shard))
    kinds = kinds_of(program)
    content["parameters"] = {
        name: learns(weight_named(program, name))
        for name, kind in sorted(kinds.items())
        if kind == "parameter"
    }
    (root / NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_stored(root: Path) -> Program:
    """Read the program of a tier-2 artifact; IntegrityError where it is broken."""
    described = _json(root / "config.json")
    content = _json(root / NAME)
    config = source_config(root, described)
    try:
        weights = _read_weights(root, content)
        for name, learning in content["parameters"].items():
            weights[name] = nn.Parameter(weights[name], requires_grad=bool(learning))
        return read_program(content, weights, config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise IntegrityError(f"{root / NAME} is broken: {error}") from error


def source_config(root: Path, described: Mapping[str, Any]) -> Any:
    """Return the config of the model that the program comes from; None for a plain module."""
    stored = described.get("source_config")
    if stored is None:
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known: Any = CONFIG_MAPPING
    if not isinstance(stored, dict) or stored.get("model_type") not in known:
        raise IntegrityError(f"{root / 'config.json'} names no source that Transformers has")
    kept = {k: v for k, v in stored.items() if k not in _FORGOTTEN}
    config = known[stored["model_type"]].from_dict(_with_floats(kept))
    config.name_or_path = str(root)
    return config


def _config_of(program: Program) -> dict[str, Any]:
    return {
        "model_type": "attnopt",
        "architectures": [_architecture(program)],
        "source": program.name,
        "source_config": None if program.config is None else _plain(program.config),
    }


def _with_floats(x: Any) -> Any:
    """Return what JSON holds, with the numbers that Transformers says in its own way."""
    if isinstance(x, dict):
        number = _NO_JSON.get(str(x.get("__float__"))) if len(x) == 1 else None
        return {k: _with_floats(v) for k, v in x.items()} if number is None else number
    return [_with_floats(y) for y in x] if isinstance(x, list) else x


_NO_JSON = {word: float(word) for word in ("Infinity", "-Infinity", "NaN")}


def _architecture(program: Program) -> str:
    """Name the class of `attnopt.auto` that runs a program."""
    if not program.generates:
        return "AttnoptModel"
    return "AttnoptForSeq2SeqLM" if program.parts else "AttnoptForCausalLM"


def _plain(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in content.items() if k not in _FORGOTTEN}


def _write_weights(program: Program, root: Path, shard: int) -> Iterator[tuple[str, Any]]:
    """Write the tensors shard by shard; yield where each name is found: [file, its name there]."""
    from safetensors.torch import save_file

    first = {name: group[0] for group in program.source.tied for name in group}
    places: dict[str, list[str]] = {}
    held: dict[str, Tensor] = {}
    size, number = 0, 1

    def flush() -> None:
        save_file(held, str(root / _file(number)))
        held.clear()

    for name in _names(program):
        tensor = weight_named(program, name)
        twin = first.get(name, name)
        if twin != name and twin in places and torch.equal(weight_named(program, twin), tensor):
            places[name] = places[twin]
            continue
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > shard:
            flush()
            size, number = 0, number + 1
        held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += bytes_
        places[name] = [_file(number), name]
    flush()
    yield from places.items()


def _file(number: int) -> str:
    return f"{FOLDER}/weights-{number:05}.safetensors"


def _names(program: Program) -> list[str]:
    """List every weight; the first name of tied ones comes before its twins."""
    parts = (program, *program.parts.values())
    names = dict.fromkeys(name for part in parts for name in part.weights)
    later = {name for group in program.source.tied for name in group[1:]}
    return sorted(names, key=lambda name: name in later)


def stored_places(root: Path) -> dict[str, tuple[Path, str]]:
    """Return the file of each weight of a tier-2 artifact, and its name there."""
    return _places(root, _json(root / NAME))


def tensor_places(root: Path) -> dict[str, tuple[Path, str]]:
    """Return the file of each tensor of a checkpoint or an artifact, and its name there."""
    if holds_program(root):
        return stored_places(root)
    found = stored_tensors(root) or {}
    return {name: (path, name) for name, path in found.items()}


def _places(root: Path, content: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    try:
        places = {str(n): (str(f), str(stored)) for n, (f, stored) in content["weights"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{root / NAME} is broken: no table of weights") from error
    for file in {file for file, _ in places.values()}:
        path = root / file
        if not _is_ours(file) or path.is_symlink() or not path.is_file():
            raise IntegrityError(
                f"{root / NAME} is broken: {file[:120]!r} is no weight file of this directory"
            )
    return {name: (root / file, stored) for name, (file, stored) in places.items()}


def _read_weights(root: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    places = _places(root, content)
    files: dict[Path, dict[str, Tensor]] = {}
    for path in sorted({path for path, _ in places.values()}):
        try:
            files[path] = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut off ({error})") from error
    listed = set(places.values())
    for path, tensors in files.items():
        extra = sorted(name for name in tensors if (path, name) not in listed)
        if extra:
            raise ValueError(f"{path} has a tensor that nothing names: {extra[0]}")
    for path, stored in places.values():
        if stored not in files[path]:
            raise ValueError(f"{path} has no tensor {stored[:80]!r}")
    return {name: files[path][stored] for name, (path, stored) in places.items()}


def _is_ours(file: str) -> bool:
    number = file.removeprefix(f"{FOLDER}/weights-").removesuffix(".safetensors")
    return number.isdecimal() and file == _file(int(number))


def _json(place: Path) -> dict[str, Any]:
    try:
        return read_json(place)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{place} is broken: {error}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
