"""What a directory that somebody else prepared may hold and name.

Transformers follows what an index, a config or a tokenizer names, also out of the directory, and
reads what links lead to: everything here is checked before it is handed on.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_READ = (".json", ".safetensors", ".jinja", ".txt", ".model", ".spm")
# What runs code when it is read or imported, by the common libraries.
_RUNS_CODE = (
    *(".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".ipynb", ".sh"),
    *(
        ".bin",
        ".pt",
        ".pt2",
        ".pth",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".joblib",
        ".dill",
        ".npy",
        ".npz",
    ),
    *(".h5", ".keras", ".tar", ".zip", ".nemo", ".mar"),
)
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = re.compile(r"[\w+=@-][\w.+=@ -]*\.safetensors", re.ASCII)
_LONGEST_NAME = 255
_LARGEST_JSON = 2**28


def check_files(directory: Path) -> None:
    """Raise ValueError where a file that is read is a link out of the directory, or no file."""
    for folder in (directory, directory / _TEMPLATES):
        if folder.is_symlink() and folder != directory:
            raise ValueError(f"{folder} is a link that leaves the directory")
        if folder.is_dir():
            for place in sorted(folder.iterdir()):
                if place.suffix in _READ and not _is_folder(place):
                    check_file(place)


def check_file(place: Path) -> None:
    """Raise ValueError for a link that leaves the directory, a pipe, a device or a folder."""
    if leaves(place):
        raise ValueError(f"{place} is a link that leaves the directory")
    if not place.is_file():
        raise ValueError(f"{place} is no regular file")


def runs_code(name: str) -> bool:
    """Tell whether a file of this name can run code."""
    return name.lower().endswith(_RUNS_CODE)


def leaves(place: Path) -> bool:
    """Tell whether a file is a link to another directory; the cache of the hub links to its own."""
    if not place.is_symlink():
        return False
    home, inside = Path(os.path.realpath(place)).parent, place.parent.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    return home not in (inside, blobs)


def is_weight_file(name: str) -> bool:
    """Tell whether a name is that of a safetensors file in the directory itself."""
    return len(name) <= _LONGEST_NAME and _WEIGHTS.fullmatch(name) is not None


def read_json(place: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError where it is none, or the file is a stranger."""
    check_file(place)
    if place.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{place} is larger than any such file")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{place} is not a JSON object")
    return content


def code_of(config: Mapping[str, Any]) -> str | None:
    """Return the setting of a config.json that names code of its author's; None without one."""
    if config.get("auto_map"):
        return "auto_map"
    kernel = next((k for k in _attention(config) if "/" in str(k)), None)
    return None if kernel is None else f"the kernel {str(kernel)[:80]}"


def refuse_elsewhere(config: Mapping[str, Any], place: Path) -> None:
    """Raise ValueError where a config.json names the file of the weights itself."""
    if config.get("transformers_weights"):
        raise ValueError(
            f"{place} names its own weight file (transformers_weights), which is not read: it has "
            "to be model.safetensors, or model.safetensors.index.json has to name it"
        )


def check_tokenizer(directory: Path) -> None:
    """Raise ValueError where a tokenizer is read from elsewhere."""
    check_files(directory)
    place = directory / "tokenizer_config.json"
    named = read_json(place).get("fast_tokenizer_files", ()) if place.is_file() else ()
    for name in named if isinstance(named, list | tuple) else [named]:
        if not isinstance(name, str) or re.search(r"[/\\:\0]", name):
            raise ValueError(f"{place} names {str(name)[:80]!r}, which leaves the directory")


def _attention(content: Any) -> Iterator[Any]:
    """Yield what a config says of how attention is computed, at any depth."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if str(key).endswith("attn_implementation"):
                yield from value.values() if isinstance(value, Mapping) else (value,)
            else:
                yield from _attention(value)


def _is_folder(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink()
