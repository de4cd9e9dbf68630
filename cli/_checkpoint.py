"""What a checkpoint directory must look like, checked before anything heavy is imported.

Only config.json, the index and the headers of the safetensors files are read. A directory without
weights passes: its architecture can be inspected. Weights that could run code, or lie outside the
directory, are refused.
"""

import json
import struct
from pathlib import Path
from typing import Any

from attnopt.cli._errors import CommandError, Exit
from attnopt.untrusted import check_files, is_weight_file

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_HEADER = 100 * 2**20


def check(folder: Path) -> None:
    """Raise CommandError where a directory is no checkpoint, or none that may be opened."""
    _check_files(folder)
    _check_config(folder)
    shards = _indexed(folder) or sorted(folder.glob("*.safetensors"))
    for shard in shards:
        _check_shard(shard)
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    weights = [name for name in pickles if name not in {"training_args.bin"}]
    if weights and not shards:
        raise CommandError(
            "AO503",
            f"refused: {folder / weights[0]} is a pickle, which can run code on loading; "
            "convert it once to safetensors where you trust it",
            Exit.SAFETY,
        )


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise CommandError("AO103", f"{folder} has no config.json{_elsewhere(folder)}")
    content = _read_json(path)
    if "model_type" not in content:
        raise CommandError(
            "AO103", f'{path} has no "model_type"; a Transformers checkpoint names its architecture'
        )


def _elsewhere(folder: Path) -> str:
    """Say where below a folder there are checkpoints, or what one looks like."""
    configs = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    below = sorted(str(path.parent) for path in configs)
    if below:
        return f"; there is one in {', '.join(below[:3])}"
    return "; a checkpoint directory has config.json and *.safetensors"


def _indexed(folder: Path) -> list[Path]:
    """Return the files that the index names, which must lie in the directory itself."""
    path = folder / _INDEX
    if not path.is_file():
        return []
    entries = _read_json(path).get("weight_map")
    if not isinstance(entries, dict):
        raise CommandError("AO103", f'{path} has no "weight_map"')
    for tensor, name in entries.items():
        if not isinstance(name, str) or not is_weight_file(name):
            raise CommandError(
                "AO502",
                f"refused: {path} maps {tensor!r} to {name[:120]!r}, outside the directory",
                Exit.SAFETY,
            )
    return [folder / name for name in sorted(set(entries.values()))]


def _check_files(folder: Path) -> None:
    try:
        check_files(folder)
    except ValueError as error:
        raise CommandError("AO502", f"refused: {error}", Exit.SAFETY) from None


def _check_shard(path: Path) -> None:
    """Compare the size of a file with what its header promises."""
    if not path.is_file():
        raise CommandError("AO504", f"{path} is missing, but {_INDEX} names it", Exit.SAFETY)
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER + 1
        header = file.read(length) if length <= _LARGEST_HEADER else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise CommandError("AO504", f"{path} is no safetensors file", Exit.SAFETY) from None
    if path.stat().st_size != promised:
        raise CommandError(
            "AO504",
            f"{path} has {path.stat().st_size:,} bytes, but its header promises {promised:,}; "
            "it is incomplete or altered: fetch it again",
            Exit.SAFETY,
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise CommandError("AO103", f"{where} is not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError("AO103", f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise CommandError("AO103", f"{path} is not a JSON object")
    return content
