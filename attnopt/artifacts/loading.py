"""Load an artifact after checking every file of it against its manifest."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attnopt.artifacts.manifest import IntegrityError, check_manifest, files_below
from attnopt.artifacts.programs import UNDERSTANDS as PROGRAM
from attnopt.artifacts.programs import read_stored
from attnopt.artifacts.staging import recovered
from attnopt.perlayer import UNDERSTANDS as PER_LAYER
from attnopt.program import Program

READER = 1
DELTA = ("delta",)
DELTA_TYPE = "attnopt_delta"
_RUNS_CODE = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".so", ".npy", ".npz")


def load(
    path: str | os.PathLike[str],
    strict: bool = True,
    base: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the model of an artifact, or of a delta and its base, in eval mode.

    Strict: every file is listed and unchanged. Always: no pickle, no code, no link, no path that
    leaves the directory, no missing and no unexpected tensor. `options` go to `from_pretrained`; an
    artifact of tier 2 takes `dtype` and `backend`.
    """
    root, config = checked(path, strict=strict)
    if is_delta(config) or base is not None:
        return _of_delta(root, config, base, options)
    if is_stored(config):
        from attnopt.auto import made_of

        return made_of(read_stored(root), **options)
    cls = _class(root, config)
    model, seen = cls.from_pretrained(
        root, output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if seen[kind]:
            name = sorted(map(str, seen[kind]))[0]
            raise IntegrityError(f"{root} has {kind.replace('_', ' ')}: {name}")
    loaded: nn.Module = model.eval()
    return loaded


def load_program(path: str | os.PathLike[str], *, strict: bool = True) -> Program:
    """Return the program of an artifact of tier 2."""
    root, config = checked(path, strict=strict)
    if not is_stored(config):
        raise IntegrityError(f"{root} holds a checkpoint and no program; capture it")
    return read_stored(root)


def is_stored(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of an artifact of tier 2."""
    return config.get("model_type") == "attnopt"


def is_delta(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a delta, which is no model without its base."""
    return config.get("model_type") == DELTA_TYPE


def _of_delta(
    root: Path,
    config: Mapping[str, Any],
    base: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> nn.Module:
    if not is_delta(config):
        raise ValueError(f"{root} is whole: load it without a base")
    if base is None:
        raise ValueError(
            f"{root} is a delta, no model: load(path, base=...) needs {str(config.get('base'))!r}"
        )
    from attnopt.artifacts.restoring import restored

    with restored(root, base) as whole:
        model: Any = load(whole, strict=False, **options)
    if hasattr(model, "config"):
        model.config.name_or_path = str(root)
    return model  # type: ignore[no-any-return]


def checked(path: str | os.PathLike[str], *, strict: bool) -> tuple[Path, dict[str, Any]]:
    """Return the directory of an artifact and its config, after every check."""
    root = Path(path).absolute()
    recovered(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no artifact at {root}")
    refuse_code(root)
    if strict:
        check_manifest(root)
    return root, _config(root)


def refuse_code(root: Path) -> None:
    """Raise IntegrityError where a directory has a file that can run code."""
    for name in files_below(root):
        if name.endswith(_RUNS_CODE):
            raise IntegrityError(f"refused: {root / name} can run code, which no artifact has")


def _config(root: Path) -> dict[str, Any]:
    place = root / "config.json"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        block = content["attnopt"]
        needed = int(block["min_reader"])
        unknown = sorted(set(block.get("must_understand", ())) - {*PER_LAYER, *PROGRAM, *DELTA})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{place} is no config of an artifact of attnopt ({error})") from error
    if needed > READER:
        raise IntegrityError(
            f"{place} needs a newer attnopt (reader {needed}; this one is {READER})"
        )
    if unknown:
        raise IntegrityError(f"{place} needs an attnopt that understands {unknown[0]!r}")
    if content.get("auto_map"):
        raise IntegrityError(f"refused: {place} names code (auto_map), which no artifact has")
    found: dict[str, Any] = content
    return found


def _class(root: Path, config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or [""]
    cls = getattr(transformers, str(names[0]), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise IntegrityError(f"{root / 'config.json'} names no class of Transformers: {names[0]!r}")
    return cls
